"""Products with weights, and their rows: every dtype and number of rows against float64."""

import re

import jax
import keras
import numpy as np
import pytest
from keras import ops
from keras import quantizers

from keras_mamba2.ops.matrix import int8_matmul
from keras_mamba2.ops.matrix import matmul
from keras_mamba2.ops.matrix import take_rows
from keras_mamba2.ops.matrix import unrounded_matmul
from keras_mamba2.ops.one_row import is_fast
from keras_mamba2.ops.one_row import row_product

SHAPES = [(1, 24), (2, 24), (1, 1, 24), (1, 5, 24), (3, 1, 24)]
ROUNDING = {"float32": 2**-24, "bfloat16": 2**-8}
rng = np.random.default_rng(0)


def rounded(shape, dtype):
    """Numbers that `dtype` can hold, as a tensor and in float64."""
    tensor = ops.convert_to_tensor(rng.normal(size=shape).astype("float32"), dtype)
    return tensor, float64(tensor)


def float64(tensor):
    return np.asarray(ops.convert_to_numpy(tensor), "float64")


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("layout", ["de", "ed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape, layout, dtype):
    x, exact_x = rounded(shape, dtype)
    kernel, exact_kernel = rounded((24, 7) if layout == "de" else (7, 24), dtype)
    exact_kernel = exact_kernel if layout == "de" else exact_kernel.T
    y = matmul(x, kernel, layout)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    exact = exact_x @ exact_kernel
    # Summed in float32, then rounded once.
    bound = ROUNDING[dtype] * np.abs(exact) + 24 * 2**-24 * (np.abs(exact_x) @ np.abs(exact_kernel))
    assert (np.abs(float64(y) - exact) <= bound).all()


@pytest.mark.parametrize("d", [128, 96, 1536, 37])
@pytest.mark.parametrize("layout", ["de", "ed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_row_is_not_rounded(dtype, layout, d):
    """Nor are sums. A matrix that divides into no equal parts is left to `matmul`."""
    x, exact_x = rounded((1, 1, d), "float32")
    shape = (d, 7) if layout == "de" else (7, d)
    kernel, exact_kernel = rounded(shape, "bfloat16")
    if dtype == "int8":
        kernel = rng.integers(-127, 128, shape, dtype="int8")
        kernel, exact_kernel = ops.convert_to_tensor(kernel), kernel.astype("float64")
    exact_kernel = exact_kernel if layout == "de" else exact_kernel.T
    assert is_fast(kernel, layout) == (d % 32 == 0)
    if is_fast(kernel, layout):
        y = jax.jit(row_product, static_argnums=2)(x, kernel, layout)
        bound = d * 2**-24 * (np.abs(exact_x) @ np.abs(exact_kernel))
        assert (np.abs(float64(y) - exact_x @ exact_kernel) <= bound).all()


@pytest.mark.parametrize(
    ("dtype", "layout"), [("bfloat16", "de"), ("bfloat16", "ed"), ("int8", "ed")]
)
def test_a_loop_with_products_of_one_row_copies_no_matrix(dtype, layout):
    """Not before it begins either, where XLA moves what does not change in it."""
    shapes = jax.ShapeDtypeStruct((1, 1536), "float32"), jax.ShapeDtypeStruct((1536, 1536), dtype)

    @jax.jit
    def loop(x, kernel):
        def body(_, x):
            return row_product(ops.tanh(x), kernel, layout)

        return jax.lax.fori_loop(0, 10, body, x)

    assert loop.lower(*shapes).compile().memory_analysis().temp_size_in_bytes < 1536**2


@pytest.mark.parametrize("dtype", ROUNDING)
def test_gradients_of_products_and_rows(dtype):
    x, exact_x = rounded((1, 24), dtype)
    kernel, exact_kernel = rounded((24, 7), dtype)
    upstream, exact_upstream = rounded((1, 7), dtype)
    _, back = jax.vjp(matmul, x, kernel)
    for found, exact in zip(
        back(upstream), (exact_upstream @ exact_kernel.T, exact_x.T @ exact_upstream), strict=True
    ):
        assert np.abs(float64(found) - exact).max() <= 4 * ROUNDING[dtype] * np.abs(exact).max()

    ids = np.array([[3, 0, 3]])

    @jax.jit
    def rows_and_gradient(matrix, ids):
        rows, back = jax.vjp(lambda matrix: take_rows(matrix, ids), matrix)
        return rows, *back(ops.ones_like(rows))

    rows, found = rows_and_gradient(kernel, ids)
    assert np.array_equal(float64(rows), exact_kernel[ids])
    assert np.array_equal(float64(found)[:, 0], np.bincount(ids[0], minlength=24))


def test_a_wider_matrix_gives_a_wider_result():
    """As the float32 embedding of a model in mixed_bfloat16."""
    y = matmul(rounded((2, 24), "bfloat16")[0], rounded((7, 24), "float32")[0], "ed")
    assert keras.backend.standardize_dtype(y.dtype) == "float32"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights_only", [False, True])
def test_int8_products(shape, weights_only):
    x, exact_x = rounded(shape, "float32")
    kernel = rng.integers(-127, 128, (7, 24), dtype="int8")
    scale, exact_scale = rounded(7, "float32")
    exact_kernel = kernel.T / exact_scale
    quantizer = None if weights_only else quantizers.AbsMaxQuantizer(axis=-1)
    y = int8_matmul(x, kernel, scale, quantizer)
    assert y.shape == (*shape[:-1], 7)
    step = 0 if weights_only else np.abs(exact_x).max(axis=-1, keepdims=True) / 127
    bound = (0.51 * step + 1e-5 * np.abs(exact_x)) @ np.abs(exact_kernel)
    assert (np.abs(float64(y) - exact_x @ exact_kernel) <= bound).all()


@pytest.mark.parametrize(("platform", "added"), [("cpu", 1), ("tpu", 0), ("cuda", 0)])
@pytest.mark.parametrize("n", [1, 512])
def test_only_a_program_for_a_cpu_has_a_row_more(n, platform, added):
    """Whatever the machine that traces it: this one has neither a TPU nor a GPU."""
    lowered = traced_int8_product(n).lower(lowering_platforms=(platform,)).as_text()
    (product,) = re.findall(r"dot_general.*", lowered)
    assert f"tensor<{n + added}x24xi8>, tensor<7x24xi8>" in product


def test_nothing_is_chosen_while_a_program_runs():
    compiled = traced_int8_product(512).lower().compile().as_text()
    assert "s8[513,24]" in compiled
    assert "conditional" not in compiled


def traced_int8_product(n):
    """Of rows `(n 24)` with a kernel `(7 24)`."""
    quantizer = quantizers.AbsMaxQuantizer(axis=-1)
    shapes = jax.ShapeDtypeStruct((n, 24), "float32"), jax.ShapeDtypeStruct((7, 24), "int8")
    scale = jax.ShapeDtypeStruct((7,), "float32")
    return jax.jit(lambda *args: int8_matmul(*args, quantizer)).trace(*shapes, scale)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_products_that_no_platform_rounds(platform):
    a, b = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((4, 8), (8, 2)))
    with jax.default_matmul_precision("default"):
        plain, unrounded = (
            jax.export.export(jax.jit(product), platforms=[platform])(a, b).mlir_module()
            for product in (ops.matmul, unrounded_matmul)
        )
    assert "HIGHEST" not in plain
    assert "HIGHEST" in unrounded
