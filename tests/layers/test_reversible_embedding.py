"""The head of a quantized embedding: what it multiplies with, and what passes back through it."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mamba2.layers import ReversibleEmbedding

EPS = np.finfo(np.float32).eps


def quantized(mode, **kwargs):
    keras.utils.set_random_seed(0)
    layer = ReversibleEmbedding(11, 8, **kwargs)
    layer.build()
    layer.quantize(mode)
    return layer


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_gradients_are_not_rounded_and_hidden_states_to_int8(mode, tie_weights):
    """Both are products with one matrix; int8 has 127 steps to a row's largest hidden state."""
    import jax

    layer = quantized(mode, tie_weights=tie_weights)
    if tie_weights:
        matrix = np.asarray(layer(np.arange(11)), np.float64).T  # (d v)
    else:
        matrix = np.asarray(layer(np.eye(8, dtype="float32"), reverse=True), np.float64)
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(size=(3, 8)), rng.normal(size=(3, 11))
    y, back = jax.vjp(lambda x: layer(x, reverse=True), x.astype("float32"))
    (gradient,) = back(upstream.astype("float32"))
    half_a_step = np.abs(x).max(axis=1, keepdims=True) / 127 / 2 if mode == "int8" else 0
    for actual, a, b, rounding in (
        (y, x, matrix, half_a_step * np.ones_like(x)),
        (gradient, upstream, matrix.T, 0 * upstream),
    ):
        bound = (rounding + 16 * EPS * np.abs(a)) @ np.abs(b)
        assert (np.abs(np.asarray(actual) - a @ b) <= bound).all()


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_logits_stay_capped(mode, tie_weights):
    x = 100 * np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    free, capped = (
        np.asarray(quantized(mode, tie_weights=tie_weights, logit_soft_cap=cap)(x, reverse=True))
        for cap in (None, 0.5)
    )
    assert np.abs(free).max() > 1
    expected = 0.5 * np.tanh(free.astype("float64") / 0.5)
    np.testing.assert_allclose(capped, expected, rtol=8 * EPS, atol=8 * EPS)


def test_modes_for_matrix_products_leave_it_as_it_is():
    layer = quantized("float8")
    assert layer.quantization_mode is None
    assert ops.shape(layer(np.eye(8, dtype="float32"), reverse=True)) == (8, 11)
