"""Damage to a state that its file's checksum finds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mamba2.host.state_file import ROW_BYTES
from keras_mamba2.host.state_file import checksum
from tests.laws import examples

SIZES = [0, 1, 7, ROW_BYTES // 4, ROW_BYTES // 4 + 3, 5 * ROW_BYTES // 4 + 1]  # of float32


def tensors(size, seed=0):
    return {"ssm.0": np.random.default_rng(seed).standard_normal(size).astype("float32")}


@examples(100)
@given(st.sampled_from(SIZES[1:]), st.data())
def test_a_flipped_bit(size, data):
    damaged = tensors(size)
    stored = damaged["ssm.0"].view(np.uint8)
    bit = data.draw(st.integers(0, 8 * stored.size - 1))
    stored[bit // 8] ^= 1 << bit % 8
    assert checksum(damaged, {}) != checksum(tensors(size), {})


@examples(100)
@given(st.sampled_from(SIZES[1:]), st.data())
def test_bytes_that_are_overwritten(size, data):
    damaged = tensors(size)
    stored = damaged["ssm.0"].view(np.uint8)
    start = data.draw(st.integers(0, stored.size - 1))
    content = data.draw(st.binary(min_size=1, max_size=2 * ROW_BYTES))
    piece = stored[start : start + len(content)]
    piece[:] = np.frombuffer(content, np.uint8)[: len(piece)]
    same = np.array_equal(stored, tensors(size)["ssm.0"].view(np.uint8))
    assert (checksum(damaged, {}) == checksum(tensors(size), {})) == same


@examples(100)
@given(st.data())
def test_rows_that_are_exchanged(data):
    damaged = tensors(SIZES[-1])
    rows = damaged["ssm.0"][:-1].view(np.uint8).reshape(-1, ROW_BYTES)
    i, j = data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=2, max_size=2))
    rows[[i, j]] = rows[[j, i]]
    assert checksum(damaged, {}) != checksum(tensors(SIZES[-1]), {})


@pytest.mark.parametrize("start", [0, 100, ROW_BYTES])
def test_a_piece_of_zeros(start):
    damaged = tensors(SIZES[-1])
    damaged["ssm.0"].view(np.uint8)[start : start + 512] = 0
    assert checksum(damaged, {}) != checksum(tensors(SIZES[-1]), {})


@pytest.mark.parametrize("size", SIZES)
def test_names_shapes_and_texts_count(size):
    good = tensors(size)["ssm.0"]
    found = {
        checksum({"ssm.0": good}, {"text": "a"}),
        checksum({"ssm.1": good}, {"text": "a"}),
        checksum({"ssm.0": good[None]}, {"text": "a"}),
        checksum({"ssm.0": good}, {"text": "b"}),
        checksum({"ssm.0": good}, {"text": "a", "model": ""}),
    }
    assert len(found) == 5
    assert checksum({"ssm.0": good.copy()}, {"text": "a", "checksum": "x"}) in found
