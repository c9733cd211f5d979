"""Damage to a state that its file's checksum finds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mamba2.host.state_file import ROW_BYTES
from keras_mamba2.host.state_file import checksum

SIZES = [0, 1, 7, ROW_BYTES // 4, ROW_BYTES // 4 + 3, 5 * ROW_BYTES // 4 + 1]


def tensors(size, seed=0):
    return {"ssm.0": np.random.default_rng(seed).standard_normal(size).astype("float32")}


@given(st.sampled_from(SIZES[1:]), st.data())
def test_two_flipped_bits(size, data):
    """In opposite directions too, which one sum would not tell."""
    damaged = tensors(size)
    stored = damaged["ssm.0"].view(np.uint8)
    bits = st.integers(0, 8 * stored.size - 1)
    for bit in data.draw(st.sets(bits, min_size=1, max_size=2)):
        stored[bit // 8] ^= 1 << bit % 8
    assert checksum(damaged, {}) != checksum(tensors(size), {})


@given(st.sampled_from(SIZES[2:]), st.data())
def test_places_that_are_exchanged(size, data):
    damaged = tensors(size)
    stored = damaged["ssm.0"]
    i, j = data.draw(st.sets(st.integers(0, size - 1), min_size=2, max_size=2))
    stored[i], stored[j] = stored[j], stored[i].copy()
    assert checksum(damaged, {}) != checksum(tensors(size), {})


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
