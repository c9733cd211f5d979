"""Where the command line keeps compiled programs, so that its next run need not compile them.

Only the command line does: to import a package should not change settings of JAX, which hold for
all of a process. Whoever calls from Python has `lm.compile(compilation_cache=...)`.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import sys
import time

VARIABLE = "KERAS_MAMBA2_COMPILATION_CACHE"
OFF = "off"
MOST_BYTES = 2**30  # of all programs: the ones that were used the longest ago make room
UNFINISHED_SECONDS = 60.0


def keep_programs(folder: str | None) -> None:
    """Lets JAX keep what it compiles, in `folder`, or by default in the user's cache folder.

    By default only where the user has not told JAX about a cache, and where the folder can be
    written to; else programs are compiled as if nothing was said.

    Args:
        folder: path, `"off"`, or `None` for the default.
    """
    import jax

    if folder == OFF:
        return
    if folder is None:
        settings = jax.config.values
        if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
            return
        if (found := _users_folder()) is None:
            return
        folder = str(found)
        if settings["jax_compilation_cache_max_size"] == -1:  # JAX's default: without a bound
            jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    use_folder(folder)


def use_folder(folder) -> None:
    """Keeps all programs that JAX compiles in `folder`, and takes from there what it has."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX keeps only programs that took long to compile. Here all are kept.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _users_folder() -> pathlib.Path | None:
    """A folder for this machine's programs, which is there, or none that can be used."""
    try:
        folder = _cache_folder() / "keras_mamba2" / "compiled" / _machine()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_the_users(folder):
            return None
        _remove_unfinished(folder)
    except (OSError, RuntimeError):  # `Path.home` where there is none
        return None
    return folder


def _cache_folder() -> pathlib.Path:
    """Where the system's programs keep what can be made again."""
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return pathlib.Path(os.environ["LOCALAPPDATA"])
    if sys.platform == "darwin":
        return pathlib.Path.home() / "Library" / "Caches"
    named = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else pathlib.Path.home() / ".cache"


def _machine() -> str:
    """A name for the kind of processor: a home may be on several machines.

    Programs for a CPU use the instructions of the one that they were compiled on.
    """
    described = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        described += sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def _is_the_users(folder: pathlib.Path) -> bool:
    """Whether nobody else can write to it: what lies there is run."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    status = folder.stat()
    return os.name == "nt" or (status.st_uid == os.getuid() and not status.st_mode & 0o022)


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Removes programs that a killed process wrote in part.

    JAX keeps them, and fails to read them and to make room ever after. It writes the time of use,
    in a file beside each, when the program is complete.
    """
    for file in folder.glob("*-cache"):
        is_whole = file.with_name(file.name.removesuffix("-cache") + "-atime").exists()
        if not is_whole and time.time() - file.stat().st_mtime > UNFINISHED_SECONDS:
            file.unlink(missing_ok=True)
