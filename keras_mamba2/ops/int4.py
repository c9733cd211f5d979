"""Products with matrices of four-bit weights, two in a byte, as Keras packs them.

Weights become floats inside the kernel that multiplies them, so that a TPU reads bytes. Three
things keep XLA from writing them out first: the two of a byte are never put side by side (their
products are), scales are repeated by broadcasting and not by an index, and a large matrix is
multiplied in parts that fit on the chip.
"""

import keras
from keras import ops

from keras_mamba2.ops.checks import float32_at_least

# Of a part of a matrix.
MOST_WEIGHTS = 2**24


def int4_matmul(x, kernel, scale, zero):
    """`x` `(... d)` times the matrix `(d e)` of `kernel`.

    Args:
        x: float tensor.
        kernel: int8 tensor `(d e/2)`, two columns in a byte.
        scale: float tensor `(g e)`, of g groups of d / g inputs.
        zero: tensor `(g e)`, the number that stands for zero.
    """
    (d, half), g = kernel.shape, scale.shape[0]
    x = ops.reshape(x, (*ops.shape(x)[:-1], g, d // g))

    def product(i):
        numbers = ops.reshape(_nibble(kernel, i), (g, d // g, half))
        w = _restored(numbers, scale[:, None, i::2], zero[:, None, i::2], x.dtype)
        return _product("...gi,gij->...j", x, w)

    y = ops.stack([product(0), product(1)], axis=-1)
    return ops.cast(ops.reshape(y, (*ops.shape(y)[:-2], 2 * half)), x.dtype)


def int4_matmul_transposed(x, kernel, scale, zero):
    """`x` `(... d)` times the transpose of the matrix `(e d)` of `kernel`.

    Args:
        x: float tensor.
        kernel: int8 tensor `(e d/2)`, two columns in a byte.
        scale: float tensor `(e g)`, of g groups of d / g columns, an even number.
        zero: tensor `(e g)`, the number that stands for zero.
    """
    (e, half), g = kernel.shape, scale.shape[1]
    parts = -(-2 * e * half // MOST_WEIGHTS)
    rows = -(-e // parts)

    def product(start, i):
        part = slice(start, start + rows)
        numbers = ops.reshape(_nibble(kernel[part], i), (-1, g, half // g))
        w = _restored(numbers, scale[part, :, None], zero[part, :, None], x.dtype)
        its = ops.reshape(x[..., i::2], (*ops.shape(x)[:-1], g, half // g))
        return _product("...gi,egi->...e", its, w)

    y = [product(start, 0) + product(start, 1) for start in range(0, e, rows)]
    return ops.cast(ops.concatenate(y, axis=-1), x.dtype)


def int4_rows(kernel, scale, zero, ids, dtype):
    """The rows `ids` `(...)` of the matrix `(e d)` of `int4_matmul_transposed`, `(... d)`."""
    kernel, scale, zero = (ops.take(part, ids, axis=0) for part in (kernel, scale, zero))
    numbers = ops.stack([_nibble(kernel, 0), _nibble(kernel, 1)], axis=-1)
    shape = (*ops.shape(ids), scale.shape[-1], 2 * kernel.shape[-1] // scale.shape[-1])
    rows = _restored(ops.reshape(numbers, shape), scale[..., None], zero[..., None], dtype)
    return ops.reshape(rows, (*ops.shape(ids), 2 * kernel.shape[-1]))


def _product(equation: str, x, w):
    """With a result in float32 on JAX, where the sums are taken.

    JAX sums over letters in their order: with others than g before i a TPU turns the matrix first.
    """
    if keras.config.backend() != "jax":
        return ops.einsum(equation, x, w)
    from jax import numpy as jnp

    return jnp.einsum(equation, x, w, preferred_element_type=float32_at_least(x.dtype))


def _nibble(kernel, i: int):
    """The lower four bits of each byte for `i = 0`, the upper ones for 1, as numbers."""
    # Of int8 alone: wider numbers would be written out.
    shift, mask, sign = (ops.cast(number, "int8") for number in (4 * i, 0x0F, 8))
    return ops.bitwise_xor(ops.bitwise_and(ops.right_shift(kernel, shift), mask), sign) - sign


def _restored(numbers, scale, zero, dtype):
    computed = float32_at_least(dtype)
    numbers, scale, zero = (ops.cast(part, computed) for part in (numbers, scale, zero))
    return ops.cast((numbers - zero) * scale, dtype)
