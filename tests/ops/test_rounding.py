"""Whole numbers with scales: how far from what they stand for."""

import numpy as np
import pytest
from keras import ops

from keras_mamba2.ops.rounding import packed
from keras_mamba2.ops.rounding import restored
from keras_mamba2.ops.rounding import rounded

SHAPE = (3, 7, 5)


def numbers(case):
    x = np.random.default_rng(0).normal(size=SHAPE).astype("float32")
    return {"any": x, "positive": 10 + abs(x), "negative": -10 - abs(x), "zero": 0 * x}[case]


CASES = ["any", "positive", "negative", "zero"]


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("case", CASES)
def test_int8_is_off_by_half_a_step(case, axis):
    x = numbers(case)
    stored = rounded(ops.convert_to_tensor(x), axis)
    assert str(stored.rounded.dtype) == "int8"
    step = np.abs(x).max(axis=axis, keepdims=True) / 127
    error = np.abs(np.asarray(restored(stored, "float32")) - x)
    assert (error <= 0.5001 * step).all()


@pytest.mark.parametrize("group_size", [1, 2, 3, 7])
@pytest.mark.parametrize("case", CASES)
def test_int4_is_off_by_a_step(case, group_size):
    """A step is a fifteenth of a group's range, with zero in it; the last group may be small."""
    x = numbers(case)
    stored = packed(ops.convert_to_tensor(x), group_size)
    assert stored.packed.shape == (3, 7, 3)
    found = np.asarray(restored(stored, "float32"))
    for begin in range(0, 7, group_size):
        rows = x[:, begin : begin + group_size]
        low, high = np.minimum(rows.min(axis=1), 0), np.maximum(rows.max(axis=1), 0)
        error = np.abs(found[:, begin : begin + group_size] - rows)
        assert (error <= 1.001 * (high - low)[:, None] / 15).all()
