"""Where the command line keeps compiled programs. No test writes into a home."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from keras_mamba2 import compiled_folder
from keras_mamba2.compiled_folder import MOST_BYTES
from keras_mamba2.compiled_folder import OFF
from keras_mamba2.compiled_folder import keep_programs

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Function for JAX's settings, which are its defaults at first. The user's folder is here."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    for name, value in zip(SETTINGS, (None, -1, 1.0), strict=True):
        jax.config.update(name, value)
    yield lambda: [jax.config.values[name] for name in SETTINGS]
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_the_users_alone_and_bounded(settings, tmp_path):
    keep_programs(None)
    folder, most, seconds = settings()
    assert (most, seconds) == (MOST_BYTES, 0.0)
    path = pathlib.Path(folder)
    assert path.parent == tmp_path / "keras_mamba2" / "compiled"
    assert path.stat().st_mode & 0o777 == 0o700


def test_settings_of_the_user_stay(settings, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    keep_programs(None)
    assert settings() == [str(tmp_path / "own"), -1, 1.0]
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_compilation_cache_max_size", 1000)
    keep_programs(None)
    assert settings()[1] == 1000


def test_a_folder_that_is_named_is_taken(settings, tmp_path):
    keep_programs(str(tmp_path / "named"))
    assert settings() == [str(tmp_path / "named"), -1, 0.0]


def test_off_changes_nothing(settings, tmp_path):
    keep_programs(OFF)
    assert settings() == [None, -1, 1.0]
    assert not list(tmp_path.iterdir())


def test_without_a_folder_there_is_silence(settings, tmp_path, monkeypatch, capfd):
    (tmp_path / "keras_mamba2").write_text("not a folder")
    keep_programs(None)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    monkeypatch.setattr(pathlib.Path, "home", no_home)
    keep_programs(None)
    assert settings() == [None, -1, 1.0]
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions")
def test_a_folder_that_others_write_to_is_left_alone(settings):
    keep_programs(None)
    folder = pathlib.Path(settings()[0])
    folder.chmod(0o777)
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs(None)
    assert settings()[0] is None


def test_what_a_killed_process_left_is_removed(settings):
    keep_programs(None)
    folder = pathlib.Path(settings()[0])
    whole, half, new = (folder / f"jit_{name}-cache" for name in ("whole", "half", "new"))
    for file in (whole, half, new):
        file.write_bytes(b"program")
    (folder / "jit_whole-atime").write_bytes(bytes(8))
    long_ago = half.stat().st_mtime - 10 * compiled_folder.UNFINISHED_SECONDS
    for file in (whole, half):
        os.utime(file, (long_ago, long_ago))
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs(None)
    assert (whole.exists(), half.exists(), new.exists()) == (True, False, True)


# What is said in compiled_folder.py: a time of use follows a program, and is needed to make room.
def test_jax_writes_the_time_of_use_last(settings, tmp_path):
    from jax._src.lru_cache import LRUCache

    (tmp_path / "half-cache").write_bytes(b"program")
    with pytest.raises(FileNotFoundError, match="half-atime"):
        LRUCache(str(tmp_path), max_size=1000).put("whole", b"program")


@pytest.mark.slow
def test_the_next_run_compiles_nothing(preset_folder, tmp_path):
    code = """
import sys
from keras_mamba2.cli import app
import jax

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
app(["generate", "to be", "--preset", sys.argv[1], "--max-new-tokens=5"], standalone_mode=False)
print("\\n", events.count("cache_misses"), events.count("cache_hits"))
"""
    script = tmp_path / "keras-mamba2"
    script.write_text(code)
    # Neither what these tests have told JAX, nor a folder of the user's.
    environment = {name: v for name, v in os.environ.items() if "CACHE" not in name}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    command = [sys.executable, str(script), str(preset_folder)]
    counts = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        counts.append([int(count) for count in done.stdout.split()[-2:]])
    assert counts[0][0] > 2
    assert counts[1] == [0, sum(counts[0])]
