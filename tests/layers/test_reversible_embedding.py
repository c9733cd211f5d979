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
def test_hidden_states_and_gradients_are_not_rounded(mode, tie_weights):
    """Both are products with one matrix. Rounded to int8, no gradient would pass."""
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
    for actual, a, b in ((y, x, matrix), (gradient, upstream, matrix.T)):
        assert (np.abs(np.asarray(actual) - a @ b) <= 16 * EPS * (np.abs(a) @ np.abs(b))).all()


def test_modes_for_matrix_products_leave_it_as_it_is():
    layer = quantized("float8")
    assert layer.quantization_mode is None
    assert ops.shape(layer(np.eye(8, dtype="float32"), reverse=True)) == (8, 11)
