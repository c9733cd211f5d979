"""Products with matrices of four-bit weights, two in a byte, as Keras packs them.

Products of whole numbers are summed over a group of inputs, and only the sums are scaled. So the
matrix is one of whole numbers, which every compute dtype holds exactly, and XLA unpacks it inside
the kernel that multiplies: a TPU reads half a byte for a weight, whatever the number of rows. A
matrix that is scaled first, as Keras does, would be written out in each step of a decode loop. On a
CPU that is faster: there XLA does it once, before the loop.
"""

from collections.abc import Callable

import keras
from keras import ops

from keras_mamba2.ops.checks import float32_at_least


def on_tpu(product: Callable, elsewhere: Callable, x):
    """`product(x)` in a program that is compiled for a TPU, `elsewhere(x)` in others."""
    if keras.config.backend() != "jax":
        return elsewhere(x)
    from jax import lax

    return lax.platform_dependent(x, tpu=product, default=elsewhere)


def int4_matmul(x, kernel, scale, zero):
    """`x` `(... d)` times the matrix `(d e)` of `kernel`.

    Args:
        x: float tensor.
        kernel: int8 tensor `(d e/2)`, two columns in a byte.
        scale: float tensor `(g e)`, of g groups of d / g inputs.
        zero: int8 tensor `(g e)`, the number that stands for zero.
    """
    (d, half), g = kernel.shape, scale.shape[0]
    x = ops.reshape(x, (*ops.shape(x)[:-1], g, d // g))
    y = _product("...gi,gijp->...pgj", x, ops.reshape(kernel, (g, d // g, half)))
    total = ops.sum(ops.cast(x, y.dtype), axis=-1)[..., None]

    def columns(p):
        z, s = (ops.cast(_every_second(part, p), y.dtype) for part in (zero, scale))
        return ops.sum((y[..., p, :, :] - total * z) * s, axis=-2)

    y = ops.stack([columns(0), columns(1)], axis=-1)
    return ops.cast(ops.reshape(y, (*ops.shape(y)[:-2], 2 * half)), x.dtype)


def int4_matmul_transposed(x, kernel, scale, zero):
    """`x` `(... d)` times the transpose of the matrix `(e d)` of `kernel`.

    Args:
        x: float tensor.
        kernel: int8 tensor `(e d/2)`, two columns in a byte.
        scale: float tensor `(e g)`, of g groups of d / g columns, an even number.
        zero: int8 tensor `(e g)`, the number that stands for zero.
    """
    (e, half), g = kernel.shape, scale.shape[1]
    x = ops.reshape(x, (*ops.shape(x)[:-1], g, half // g, 2))
    y = _product("...gip,egip->...eg", x, ops.reshape(kernel, (e, g, half // g)))
    total = ops.sum(ops.cast(x, y.dtype), axis=(-2, -1))[..., None, :]
    z, s = ops.cast(zero, y.dtype), ops.cast(scale, y.dtype)
    return ops.cast(ops.sum((y - total * z) * s, axis=-1), x.dtype)


def int4_rows(kernel, scale, zero, ids, dtype):
    """The rows `ids` `(...)` of the matrix `(e d)` of `int4_matmul_transposed`, `(... d)`.

    Keras unpacks the whole matrix for them.
    """
    kernel, scale, zero = (ops.take(part, ids, axis=0) for part in (kernel, scale, zero))
    four, computed = ops.cast(4, "int8"), float32_at_least(dtype)
    low = ops.right_shift(ops.left_shift(kernel, four), four)
    numbers = ops.stack([low, ops.right_shift(kernel, four)], axis=-1)
    groups = ops.reshape(numbers, (*ops.shape(scale), -1))
    groups, scale, zero = (ops.cast(part, computed) for part in (groups, scale, zero))
    rows = (groups - zero[..., None]) * scale[..., None]
    return ops.cast(ops.reshape(rows, (*ops.shape(ids), 2 * kernel.shape[-1])), dtype)


def _every_second(part, p: int):
    """Columns p, p + 2 ...: in pairs, or without the barrier, they would be copied in each step."""
    from jax import lax

    return lax.optimization_barrier(part[:, p::2])


def _product(equation: str, x, kernel):
    """With the two numbers of each byte, the lower four bits first, as the last axis.

    In float32 at least, where the sums are taken.
    """
    from jax import lax
    from jax import numpy as jnp

    numbers = lax.bitcast_convert_type(kernel, jnp.int4).astype(x.dtype)
    return jnp.einsum(equation, x, numbers, preferred_element_type=float32_at_least(x.dtype))
