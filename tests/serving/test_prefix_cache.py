"""States of known beginnings: which are found, which are kept, and by whom."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import keras_mamba2
from keras_mamba2.serving.engine import Engine
from keras_mamba2.serving.prefix_cache import PrefixCache
from keras_mamba2.state import Mamba2State
from keras_mamba2.state import files
from tests.serving.collected import GREEDY
from tests.serving.collected import Collected
from tests.serving.collected import alone
from tests.serving.collected import wait_until

TEXT = np.arange(100, dtype="int32")


def state_after(backbone, token_ids):
    """A state of the right shapes and length."""
    state = backbone.initial_state(1)
    length = np.array([len(token_ids)], "int32")
    return Mamba2State(state.layers, state.token, length, state.digest)


@pytest.fixture(scope="module")
def backbone(lm):
    return lm.backbone


@pytest.fixture(scope="module")
def nbytes(backbone):
    return backbone.initial_state(1).nbytes


@pytest.fixture
def cache(backbone):
    return PrefixCache(backbone, 2**30, shortest=4)


def add(cache, backbone, *texts):
    for text in texts:
        cache.add(text, state_after(backbone, text))


class TestLongest:
    def test_the_longest_that_a_text_begins_with(self, cache, backbone):
        add(cache, backbone, TEXT[:10], TEXT[:20], TEXT[:50], np.append(TEXT[:30], 7))
        assert len(cache.longest(TEXT[:40]).token_ids) == 20
        assert len(cache.longest(TEXT[:50]).token_ids) == 50
        assert len(cache.longest(TEXT).token_ids) == 50
        assert cache.longest(TEXT[:9]) is None
        assert cache.longest(TEXT[1:]) is None
        assert (cache.hits, cache.misses) == (3, 2)

    def test_where_prompts_part(self, cache):
        assert cache.meeting(TEXT) == 0
        assert cache.meeting(np.append(TEXT[:30], 7)) == 30
        assert cache.meeting(np.append(TEXT[:60], 7)) == 60
        assert cache.meeting(TEXT[50:]) == 0

    def test_short_texts_are_not_kept(self, cache, backbone):
        add(cache, backbone, TEXT[:3])
        assert len(cache) == 0

    def test_a_state_does_not_change_with_what_it_was_made_of(self, cache, backbone):
        state = state_after(backbone, TEXT)
        cache.add(TEXT, state)
        kept = cache.longest(TEXT).state.layers[0]
        assert not any(np.shares_memory(a, b) for a, b in zip(kept, state.layers[0], strict=True))


class TestBound:
    def test_what_was_not_used_for_longest_goes_first(self, backbone, nbytes):
        cache = PrefixCache(backbone, 2 * nbytes, shortest=4)
        first, second, third = TEXT[:10], TEXT[10:20], TEXT[20:30]
        add(cache, backbone, first, second)
        cache.longest(first)
        add(cache, backbone, third)
        assert cache.longest(second) is None
        assert cache.longest(first) is not None
        assert cache.longest(third) is not None
        assert (cache.nbytes, cache.evictions) == (2 * nbytes, 1)

    @pytest.mark.parametrize("share", [0, 0.5])
    def test_without_room_nothing_is_kept(self, backbone, nbytes, share):
        cache = PrefixCache(backbone, int(share * nbytes), shortest=4)
        add(cache, backbone, TEXT)
        assert (len(cache), cache.nbytes) == (0, 0)

    def test_again_is_not_twice(self, cache, backbone, nbytes):
        add(cache, backbone, TEXT, TEXT)
        assert (len(cache), cache.nbytes) == (1, nbytes)


class TestFolder:
    def test_states_survive(self, backbone, tmp_path):
        cache = PrefixCache(backbone, 2**30, tmp_path, shortest=4)
        add(cache, backbone, TEXT[:10], TEXT[:20])
        cache.longest(TEXT[:10])
        cache.close()
        again = PrefixCache(backbone, 2**30, tmp_path, shortest=4)
        found = again.longest(TEXT)
        np.testing.assert_array_equal(found.token_ids, TEXT[:20])
        assert found.state.length.tolist() == [20]
        again.close()
        assert len(list(tmp_path.rglob("*.safetensors"))) == 2

    def test_what_is_not_kept_any_more_is_removed(self, backbone, nbytes, tmp_path):
        cache = PrefixCache(backbone, 2**30, tmp_path, shortest=4)
        add(cache, backbone, TEXT[:10], TEXT[:20], TEXT[:30])
        cache.longest(TEXT[:10])
        cache.close()
        smaller = PrefixCache(backbone, 2 * nbytes, tmp_path, shortest=4)
        assert {len(known.token_ids) for known in smaller._known.values()} == {10, 30}
        smaller.close()
        assert len(list(tmp_path.rglob("*.safetensors"))) == 2

    def test_those_of_another_model_are_never_used(self, backbone, preset_folder, tmp_path, caplog):
        cache = PrefixCache(backbone, 2**30, tmp_path, shortest=4)
        add(cache, backbone, TEXT)
        cache.close()
        other = keras_mamba2.Mamba2Backbone.from_preset(preset_folder)
        table = other.token_embedding.embeddings
        table.assign(table + 1)
        theirs = PrefixCache(other, 2**30, tmp_path, shortest=4)
        assert len(theirs) == 0
        # Not even if somebody moves the file.
        [file] = tmp_path.rglob("*.safetensors")
        theirs.close()
        folder = next(f for f in tmp_path.iterdir() if f != file.parent)
        os.rename(file, folder / file.name)
        assert len(PrefixCache(other, 2**30, tmp_path, shortest=4)) == 0
        assert "the state of another model" in caplog.text

    def test_states_in_other_dtypes_stay_apart(self, backbone, preset_folder, tmp_path):
        cache = PrefixCache(backbone, 2**30, tmp_path, shortest=4)
        add(cache, backbone, TEXT)
        cache.close()
        other = keras_mamba2.Mamba2Backbone.from_preset(preset_folder, state_dtype="bfloat16")
        theirs = PrefixCache(other, 2**30, tmp_path, shortest=4)
        assert len(theirs) == 0
        add(theirs, other, TEXT)
        theirs.close()
        for each in (backbone, other):
            again = PrefixCache(each, 2**30, tmp_path, shortest=4)
            assert len(again) == 1
            again.close()

    @pytest.mark.parametrize("damage", ["cut", "renamed"])
    def test_a_damaged_file_is_left_out(self, backbone, tmp_path, caplog, damage):
        cache = PrefixCache(backbone, 2**30, tmp_path, shortest=4)
        add(cache, backbone, TEXT)
        cache.close()
        [file] = tmp_path.rglob("*.safetensors")
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-9])
        else:
            file.rename(file.with_name("0" * 64 + ".safetensors"))
        assert len(PrefixCache(backbone, 2**30, tmp_path, shortest=4)) == 0
        assert "Not used as a known prefix" in caplog.text


def file_names(folder):
    """The files and what is beside them, such as what a dead writer leaves."""
    return sorted(path.name for path in folder.glob("*/*"))


class Slow:
    """A disk that writes when it is told to."""

    def __init__(self, monkeypatch):
        self.may_write = threading.Event()
        self.written = []
        save = files.save

        def wait_and_save(file, *args):
            assert self.may_write.wait(timeout=60)
            self.written.append(file.name)
            save(file, *args)

        monkeypatch.setattr(files, "save", wait_and_save)


class TestInTheBackground:
    def test_states_are_written_while_it_goes_on(self, backbone, tmp_path):
        cache = PrefixCache(backbone, 2**30, tmp_path, shortest=4)
        add(cache, backbone, TEXT[:10])
        wait_until(lambda: list(tmp_path.glob("*/*.safetensors")))
        again = PrefixCache(backbone, 2**30, tmp_path, shortest=4)  # as after a crash
        assert len(again.longest(TEXT).token_ids) == 10

    def test_nobody_waits_for_a_slow_disk(self, backbone, nbytes, tmp_path, monkeypatch):
        """And it does not write what is not wanted any more, nor twice what is used twice."""
        slow = Slow(monkeypatch)
        cache = PrefixCache(backbone, 3 * nbytes, tmp_path, shortest=4)
        for _ in range(2):
            add(cache, backbone, *(TEXT[:n] for n in range(10, 60)))
        assert cache.evictions > 90
        slow.may_write.set()
        cache.close()
        assert len(slow.written) <= 4  # three, and the one that it was at
        assert len(file_names(tmp_path)) == 3
        again = PrefixCache(backbone, 2**30, tmp_path, shortest=4)
        assert {len(known.token_ids) for known in again._known.values()} == {57, 58, 59}

    def test_an_engine_goes_on_beside_a_slow_disk(self, lm, tmp_path, monkeypatch):
        slow = Slow(monkeypatch)
        engine = Engine(lm, max_sequences=1, block_size=32, prefix_cache_folder=tmp_path)
        engine.start()
        for prompt in ("a" * 40, "b" * 40):
            assert [Collected(prompt).submit(engine).tokens()] == alone(lm, prompt, **GREEDY)
        assert slow.written == []
        slow.may_write.set()
        engine.close()
        assert len(file_names(tmp_path)) == 4  # after each prompt, and after each text

    @pytest.mark.parametrize("kind", [OSError, RuntimeError])
    def test_a_full_disk_ends_nothing(self, backbone, tmp_path, monkeypatch, caplog, kind):
        def fail(*args):
            raise kind("No space left on device")

        cache = PrefixCache(backbone, 2**30, tmp_path, shortest=4)
        with monkeypatch.context() as context:
            context.setattr(files, "save", fail)
            add(cache, backbone, TEXT[:10])
            wait_until(lambda: "No space left on device" in caplog.text)
        add(cache, backbone, TEXT[:20])
        assert len(cache.longest(TEXT[:15]).token_ids) == 10  # and written now
        cache.close()
        assert len(file_names(tmp_path)) == 2

    @pytest.mark.slow
    def test_a_killed_process_leaves_whole_files(self, backbone, preset_folder, tmp_path, caplog):
        script = pathlib.Path(__file__).with_name("keep_until_killed.py")
        found = []
        for pause in (0.0, 0.05, 0.2):
            command = [sys.executable, script, preset_folder, tmp_path]
            with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE) as process:
                process.stdout.readline()  # files are written now
                time.sleep(pause)
                process.kill()
            assert process.returncode == -signal.SIGKILL
            cache = PrefixCache(backbone, 2**30, tmp_path, shortest=4)
            assert len(cache) == len(file_names(tmp_path))
            found.append(len(cache))
            cache.close()
        assert any(found)
        assert caplog.text == ""


def test_an_engine_finds_what_another_one_knew(lm, tmp_path):
    prompt = "Once more unto the breach, dear friends, once more"
    cached = []
    for _ in range(2):
        engine = Engine(lm, max_sequences=1, block_size=32, prefix_cache_folder=tmp_path)
        engine.start()
        request = Collected(prompt).submit(engine)
        assert [request.tokens()] == alone(lm, prompt, **GREEDY)
        cached.append(request.request.cached_tokens)
        engine.close()
    assert cached == [0, len(prompt) - 1]
