"""Products with int4 matrices, against the matrix that Keras unpacks."""

import keras
import numpy as np
import pytest
from keras import ops
from keras import quantizers

from keras_mamba2._compat.keras_layers import stored_embeddings
from keras_mamba2._compat.keras_layers import stored_kernel
from keras_mamba2.layers.projection import Projection
from keras_mamba2.layers.reversible_embedding import ReversibleEmbedding
from keras_mamba2.ops.int4 import int4_matmul
from keras_mamba2.ops.int4 import int4_matmul_transposed
from keras_mamba2.ops.int4 import int4_rows

rng = np.random.default_rng(0)
G, D, E = 3, 24, 10


def of_matrix(shape, scale_shape):
    """A random packed matrix, and what stands in it, in float64."""
    numbers = rng.integers(-8, 8, shape).astype("int8")
    packed, *_ = quantizers.pack_int4(numbers, axis=-1)
    scale = rng.uniform(0.01, 0.1, scale_shape).astype("float32")
    zero = rng.integers(-8, 8, scale_shape).astype("int8")
    return numbers.astype("float64"), ops.convert_to_numpy(packed), scale, zero


def assert_close(actual, truth, dtype):
    eps = {"float32": 2.0**-23, "bfloat16": 2.0**-8}[dtype]
    error = np.abs(ops.convert_to_numpy(ops.cast(actual, "float32")) - truth).max()
    assert error <= 16 * eps * np.abs(truth).max()


@pytest.fixture(params=["float32", "bfloat16"])
def x(request):
    return ops.cast(rng.normal(size=(2, 3, D)), request.param), request.param


def exact(x):
    return ops.convert_to_numpy(ops.cast(x, "float32")).astype("float64")


def test_columns_in_pairs(x):
    x, dtype = x
    numbers, packed, scale, zero = of_matrix((D, E), (G, E))
    matrix = (numbers - np.repeat(zero, D // G, 0)) * np.repeat(scale, D // G, 0)
    assert_close(int4_matmul(x, packed, scale, zero), exact(x) @ matrix, dtype)


def test_the_transposed_and_its_rows(x):
    x, dtype = x
    numbers, packed, scale, zero = of_matrix((E, D), (E, G))
    matrix = (numbers - np.repeat(zero, D // G, 1)) * np.repeat(scale, D // G, 1)
    y = int4_matmul_transposed(x, packed, scale, zero)
    assert_close(y, exact(x) @ matrix.T, dtype)
    ids = np.array([[3, 0], [9, 3]])
    rows = int4_rows(packed, scale, zero, ids, dtype)
    assert_close(rows, matrix[ids], dtype)


def quantized(layer, inputs):
    layer.build(inputs)
    layer.quantize("int4", config=keras.quantizers.Int4QuantizationConfig(block_size=8))
    return layer


def test_a_projection_has_these_parts():
    layer = quantized(Projection(E, use_bias=False), (None, D))
    x = rng.normal(size=(2, 3, D)).astype("float32")
    y = int4_matmul(x, stored_kernel(layer), layer.kernel_scale, layer.kernel_zero)
    truth = ops.convert_to_numpy(layer(x)).astype("float64")
    assert_close(y, truth, "float32")


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_has_these_parts(tied):
    layer = quantized(ReversibleEmbedding(E, D, tie_weights=tied), (None, None))
    x = rng.normal(size=(2, 3, D)).astype("float32")
    parts = stored_embeddings(layer), layer.embeddings_scale, layer.embeddings_zero
    if not tied:
        parts = layer.reverse_embeddings, layer.reverse_embeddings_scale
        parts = map(ops.transpose, (*parts, layer.reverse_embeddings_zero))
    y = int4_matmul_transposed(x, *map(ops.convert_to_tensor, parts))
    truth = ops.convert_to_numpy(layer(x, reverse=True)).astype("float64")
    assert_close(y, truth, "float32")
