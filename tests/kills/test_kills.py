"""Killed or out of space at any moment: the old one or the new one is there, whole, and no litter.

KERAS_MAMBA2_KILLS=30 kills thirty of each kind, which takes minutes; a few by default.
"""

import contextlib
import json
import multiprocessing
import os
import random
import time

import numpy as np
import pytest

from tests.kills import writers

KILLS = int(os.environ.get("KERAS_MAMBA2_KILLS", "2"))
SECONDS = 120  # more than anything here takes
pytestmark = pytest.mark.slow

# Imports once, and forks: JAX has no threads yet.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.kills.writers"])


@contextlib.contextmanager
def running(function, *arguments):
    """A process, and the end of a pipe to it; dead in the end."""
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=function, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


def received(pipe):
    assert pipe.poll(SECONDS), "the writer hangs"
    return pipe.recv()  # EOFError if it died


def is_in_a_write(folder):
    return folder.is_dir() and any(name.startswith(".") for name in os.listdir(folder))


@pytest.mark.parametrize("name", writers.WRITERS)
def test_a_killed_writer_leaves_the_old_or_the_new(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    writer, seed = writers.WRITERS[name](folder), random.Random(name)
    met = 0
    for _ in range(KILLS):
        with running(writers.write_until_killed, name, folder) as (_, pipe):
            time.sleep(seed.uniform(0, 2) * received(pipe))
        met += is_in_a_write(folder) or is_in_a_write(folder / "target")
        if type(writer).make_room is writers.Writer.make_room or writer.target.exists():
            assert writer.read() >= 1
        writer.make_room()
        writer.write(1_000)
        assert writer.read() == (1 if name == "Convert" else 1_000)
        assert [path.name for path in folder.iterdir()] == [writer.name]
        assert name != "Backup" or len(list(writer.target.iterdir())) == 1
    print(json.dumps({"kind": name, "kills": KILLS, "in a write": met}))
    assert met or KILLS < 10


@pytest.mark.parametrize("name", writers.WRITERS)
def test_a_full_disk_leaves_the_old(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with running(writers.write_to_a_full_disk, name, folder) as (_, pipe):
        error, notes = received(pipe)
    assert "File too large" in error or "errno = 27" in error, error
    assert "What was there before is unchanged." in " ".join(notes)
    if name in ("Export", "Convert"):  # which refuse to write over another
        assert not list(folder.iterdir())
    else:
        assert [path.name for path in folder.iterdir()] == [writers.WRITERS[name].name]
        assert writers.WRITERS[name](folder).read() == 1


def wait_for_a_write(folder, pipe):
    while not is_in_a_write(folder) and not pipe.poll(0.0005):
        pass


def test_fit_goes_on_after_kills(tmp_path):
    """However often it was killed, a run ends with exactly the weights of one that was not."""
    with running(writers.fit, tmp_path / "undisturbed") as (_, pipe):
        assert received(pipe) is False
        start = time.perf_counter()
        assert received(pipe) is None
        seconds = time.perf_counter() - start
    expected = np.load(tmp_path / "undisturbed.npz")
    seed, kills, runs, resumed, met = random.Random(0), 0, 0, 0, 0
    ended = True
    while kills < KILLS or not ended:
        folder = tmp_path / str(runs)
        with running(writers.fit, folder) as (_, pipe):
            resumed += received(pipe)
            if kills >= KILLS:
                assert received(pipe) is None
            elif kills % 2:
                time.sleep(seed.uniform(0, seconds))
            else:
                time.sleep(seed.uniform(0, seconds / 2))
                wait_for_a_write(folder / "backup", pipe)
                time.sleep(seed.uniform(0, 0.01))
        ended = folder.with_suffix(".npz").exists() and not (folder / "backup").exists()
        if ended:
            weights = np.load(folder.with_suffix(".npz"))
            assert all(np.array_equal(weights[name], expected[name]) for name in expected)
            assert not folder.exists() or not list(folder.iterdir())
            runs += 1
        else:
            kills += 1
            met += is_in_a_write(folder / "backup")
    print(json.dumps({"kind": "fit", "kills": kills, "in a write": met, "resumed": resumed}))
    assert runs
    assert resumed or KILLS < 10
