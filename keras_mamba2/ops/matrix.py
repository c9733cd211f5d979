"""Products with a matrix of weights, and its rows, in the forms that XLA is fast at on a CPU.

There it has fast products of bfloat16 that give float32, and of int8 if the matrix lies as
`(out in)`, both of at least two rows. Before any other product it converts the whole matrix to
float32; for a decode loop, all matrices before the loop begins. One row has products of its own.

The platform is the one that a program is compiled for: other platforms, and other backends than
JAX, get the plain product.
"""

import functools
import math

import keras
from keras import ops

from keras_mamba2.ops.one_row import is_fast
from keras_mamba2.ops.one_row import row_product

# Of x, where it pays to have the matrix `(e d)` on the left of a product.
FEW_ROWS = range(2, 33)


def matmul(x, kernel, layout: str = "de"):
    """`x` `(... d)` times `kernel`, `(d e)` or, with the layout "ed", `(e d)`."""
    kernel = ops.convert_to_tensor(kernel)
    if layout == "ed" and are_on_jax("float32", x, kernel) and _num_rows(x) in FEW_ROWS:
        return _matrix_first(x, kernel)
    if not are_on_jax("bfloat16", x, kernel):
        return ops.matmul(x, kernel if layout == "de" else ops.transpose(kernel))
    import jax
    from jax import lax
    from jax import numpy as jnp

    product = functools.partial(jnp.einsum, f"...d,{layout}->...e")

    def float32_result(x, kernel):
        return product(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)

    @jax.custom_jvp
    def one_row(x, kernel):
        return row_product(x, kernel, layout).astype(x.dtype)

    @one_row.defjvp
    def _(primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        return one_row(x, kernel), product(dx, kernel) + product(x, dkernel)

    on_cpu = one_row if _has_row_product(x, kernel, layout) else with_padding_row(float32_result)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=product)


def unrounded_matmul(x, kernel):
    """`x` `(... d)` times `kernel` `(d e)`. TPUs and GPUs round float32 factors unless told."""
    if keras.config.backend() != "jax":
        return ops.matmul(x, kernel)
    import jax

    with jax.default_matmul_precision("highest"):
        return ops.matmul(x, kernel)


def _matrix_first(x, kernel):
    """The product as `kernel x`, turned afterwards: for few rows XLA's is a fifth faster."""
    from jax import lax

    def product(x, kernel):
        return ops.matmul(x, ops.transpose(kernel))

    def turned(x, kernel):
        rows = ops.reshape(x, (-1, x.shape[-1]))
        y = lax.optimization_barrier(ops.matmul(kernel, ops.transpose(rows)))
        return ops.reshape(ops.transpose(y), (*x.shape[:-1], kernel.shape[0]))

    return lax.platform_dependent(x, kernel, cpu=turned, default=product)


def take_rows(matrix, ids):
    """The rows `ids` `(...)` of `matrix` `(v d)`, `(... d)`, or matrices of `(v in out)`."""
    return _taken(lambda matrix, ids: ops.take(matrix, ids, axis=0), matrix, ids)


def take_matrix(matrices, index):
    """The matrix at `index`, an int scalar, of `(e in out)`, `(in out)`."""

    def take(matrices, index):
        return ops.slice(matrices, (index, 0, 0), (1, *matrices.shape[1:]))[0]

    return _taken(take, matrices, index)


def _taken(take, matrix, ids):
    """`take(matrix, ids)`. On a CPU bfloat16 is taken by its bits, or XLA makes float32 of all."""
    if not are_on_jax("bfloat16", matrix):
        return take(matrix, ids)
    import jax
    from jax import lax
    from jax import numpy as jnp

    @jax.custom_jvp
    def take_bits(matrix, ids):
        # What seems to change with the ids is not copied before a loop.
        matrix, ids = lax.optimization_barrier((matrix, ids))
        bits = take(lax.bitcast_convert_type(matrix, jnp.uint16), ids)
        return lax.bitcast_convert_type(bits, jnp.bfloat16)

    @take_bits.defjvp
    def _(primals, tangents):
        return take_bits(*primals), take(tangents[0], primals[1])

    return lax.platform_dependent(matrix, ids, cpu=take_bits, default=take)


def are_on_jax(dtype: str, *tensors) -> bool:
    dtypes = {keras.backend.standardize_dtype(tensor.dtype) for tensor in tensors}
    return keras.config.backend() == "jax" and dtypes == {dtype}


def _num_rows(x) -> int | None:
    sizes = x.shape[:-1]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _has_row_product(x, kernel, layout: str) -> bool:
    return _num_rows(x) == 1 and is_fast(kernel, layout)


def int8_matmul(x, kernel, kernel_scale, inputs_quantizer=None):
    """`x` `(... d)` times the transpose of `kernel / kernel_scale`, `(e d)` and `(e)`.

    Differentiable in `x`, as if nothing were rounded.

    Args:
        x: float tensor.
        kernel: int8 tensor.
        kernel_scale: float tensor.
        inputs_quantizer: a quantizer of Keras that rounds `x` to int8, or None.
    """

    @ops.custom_gradient
    def product(x, kernel, kernel_scale):
        def gradient(*args, upstream=None):
            if upstream is None:
                (upstream,) = args
            upstream = upstream / kernel_scale
            return ops.matmul(upstream, ops.cast(kernel, upstream.dtype)), None, None

        if inputs_quantizer is None:
            return _int8_weights_product(x, kernel) / kernel_scale, gradient
        rounded, scale = inputs_quantizer(x, axis=-1)
        y = int8_product(rounded, kernel)
        return ops.cast(ops.cast(y, scale.dtype) / (scale * kernel_scale), x.dtype), gradient

    return product(x, ops.convert_to_tensor(kernel), ops.convert_to_tensor(kernel_scale))


def int8_product(x, kernel):
    """`x` `(... d)` times `kernel` `(e d)`, both int8: `(... e)`, int32."""
    product = functools.partial(ops.einsum, "...d,ed->...e")
    if keras.config.backend() != "jax":
        return product(x, kernel)
    from jax import lax

    def one_row(x, kernel):  # sums of whole numbers, which float32 holds
        return ops.cast(row_product(x, kernel, "ed"), "int32")

    on_cpu = one_row if _has_row_product(x, kernel, "ed") else with_padding_row(product)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=product)


def _int8_weights_product(x, kernel):
    """`x` `(... d)`, not rounded, times `kernel` `(e d)`, int8: `(... e)`."""

    def product(x, kernel):
        return matmul(x, ops.cast(kernel, x.dtype), "ed")

    if not (keras.config.backend() == "jax" and _has_row_product(x, kernel, "ed")):
        return product(x, kernel)
    from jax import lax

    def one_row(x, kernel):
        return row_product(x, kernel, "ed").astype(x.dtype)

    return lax.platform_dependent(x, kernel, cpu=one_row, default=product)


def with_padding_row(product):
    """`product(x, kernel)`, where the first row of `x` is added once more at the end.

    So there are at least two. The added row also separates the product from what made `x`: XLA
    would merge two einsums, and then compute both in float32.
    """

    def call(x, kernel):
        rows = ops.reshape(x, (-1, x.shape[-1]))
        y = product(ops.concatenate([rows, rows[:1]]), kernel)[:-1]
        return ops.reshape(y, (*ops.shape(x)[:-1], y.shape[-1]))

    return call
