"""`ops/attention.py` against softmax attention in float64, written out."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mamba2.ops import attention
from keras_mamba2.ops.attention import Past
from keras_mamba2.ops.attention import attend
from keras_mamba2.ops.rounding import restored
from keras_mamba2.ops.rounding import rounded

B, T, G, R, P = 2, 11, 2, 3, 8
SCALE = 0.4


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several parts of everything, the last of them smaller."""
    monkeypatch.setattr(attention, "PAST_PART", 4)
    monkeypatch.setattr(attention, "LEAST_QUERIES", 3)


def inputs(room: int, dtype: str = "float32", size: float = 1.0):
    """q, keys, values, keys and values of the past."""
    rng = np.random.default_rng(0)
    shapes = [(B, T, G, R, P), *[(B, G, T, P)] * 2, *[(B, G, room, P)] * 2]
    return [ops.cast(size * rng.normal(size=shape), dtype) for shape in shapes]


def causal(mask=None):
    seen = np.tril(np.ones((T, T), bool))[None]
    return seen if mask is None else (seen & mask[:, None]) | np.eye(T, dtype=bool)


def truth(q, keys, values, seen, past_keys, past_values, lengths, is_seen):
    """In float64, with all keys at once."""
    q, *parts = (
        ops.convert_to_numpy(a).astype("float64") for a in (q, keys, values, past_keys, past_values)
    )
    keys, values = (np.concatenate([parts[i + 2], parts[i]], axis=2) for i in (0, 1))
    there = np.arange(parts[2].shape[2]) < np.array(lengths)[:, None]
    before = there[:, None] & np.array(is_seen)[..., None]
    seen = np.concatenate([before, np.broadcast_to(seen, (B, T, T))], axis=2)
    scores = np.einsum("btgrp,bgsp->bgtrs", q, keys) * SCALE
    scores = np.where(seen[:, None, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return np.einsum("bgtrs,bgsp->btgrp", weights, values)


CASES = {
    "one part": (4, (3, 1)),
    "parts of one size": (8, (8, 3)),
    "a smaller last part": (10, (10, 9)),
    "the last part is empty": (10, (7, 4)),
    "nothing before": (10, (0, 0)),
    "nothing before one row": (10, (0, 10)),
}


@pytest.mark.parametrize(("room", "lengths"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_are_the_whole(room, lengths, dtype):
    q, keys, values, *before = inputs(room, dtype)
    is_seen = np.ones((B, T), bool)
    is_seen[0, 6:] = False  # a second document
    past = Past(*before, ops.convert_to_tensor(lengths, "int32"), ops.convert_to_tensor(is_seen))
    seen = ops.convert_to_tensor(causal())
    y = attend(q, keys, values, seen, SCALE, past, is_causal=True)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    expected = truth(q, keys, values, causal(), *before, lengths, is_seen)
    tolerance = {"float32": 2e-6, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(ops.convert_to_numpy(y).astype("float64"), expected, atol=tolerance)


def test_padding_is_not_seen():
    q, keys, values, *_ = inputs(1)
    mask = np.ones((B, T), bool)
    mask[0, :4] = mask[1, 9:] = False
    seen = causal(mask)
    y = attend(q, keys, values, ops.convert_to_tensor(seen), SCALE, is_causal=True)
    empty = [np.zeros((B, G, 1, P))] * 2, (0, 0), np.ones((B, T), bool)
    expected = truth(q, keys, values, seen, *empty[0], *empty[1:])
    np.testing.assert_allclose(ops.convert_to_numpy(y), expected, atol=2e-6)


def test_scores_far_apart_do_not_overflow():
    q, keys, values, *before = inputs(10, size=40.0)
    lengths, is_seen = (10, 5), np.ones((B, T), bool)
    past = Past(*before, ops.convert_to_tensor(lengths, "int32"), ops.convert_to_tensor(is_seen))
    y = attend(q, keys, values, ops.convert_to_tensor(causal()), SCALE, past, is_causal=True)
    expected = truth(q, keys, values, causal(), *before, lengths, is_seen)
    np.testing.assert_allclose(ops.convert_to_numpy(y), expected, rtol=1e-3, atol=1e-2)


def test_what_has_no_place_is_not_read():
    q, keys, values, *before = inputs(10)
    is_seen = ops.ones((B, T), "bool")
    lengths = ops.convert_to_tensor((5, 2), "int32")
    seen = ops.convert_to_tensor(causal())
    there = ops.arange(10)[:, None] < 5
    changed = [ops.where(there, a, 1e30) for a in before]
    outputs = [
        attend(q, keys, values, seen, SCALE, Past(*past, lengths, is_seen), is_causal=True)
        for past in (before, changed)
    ]
    np.testing.assert_array_equal(*map(ops.convert_to_numpy, outputs))


def test_rounded_keys_and_values_are_restored():
    q, *tensors = inputs(10)
    stored = [rounded(a, axis=-1) for a in tensors]
    lengths = ops.convert_to_tensor((10, 6), "int32"), ops.ones((B, T), "bool")
    seen = ops.convert_to_tensor(causal())
    outputs = [
        attend(q, keys, values, seen, SCALE, Past(*before, *lengths), is_causal=True)
        for keys, values, *before in (stored, [restored(a, "float32") for a in stored])
    ]
    np.testing.assert_allclose(*map(ops.convert_to_numpy, outputs), atol=1e-6)


@pytest.mark.skipif(keras.config.backend() != "jax", reason="gradients of JAX")
def test_gradients_are_those_of_the_whole(monkeypatch):
    import jax

    arguments = inputs(10)
    is_seen = ops.ones((B, T), "bool")
    lengths = ops.convert_to_tensor((9, 3), "int32")

    def loss(q, keys, values, *before):
        past = Past(*before, lengths, is_seen)
        y = attend(q, keys, values, causal(), SCALE, past, is_causal=True)
        return (y**2).sum()

    def gradients():
        return jax.jit(jax.grad(loss, argnums=range(5)))(*arguments)

    in_parts = gradients()
    monkeypatch.setattr(attention, "PAST_PART", 10)
    monkeypatch.setattr(attention, "LEAST_QUERIES", T)
    for part, whole in zip(in_parts, gradients(), strict=True):
        np.testing.assert_allclose(part, whole, atol=1e-5)
