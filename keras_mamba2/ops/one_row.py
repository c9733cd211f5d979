"""The product of one row with a matrix of narrow numbers, for XLA on a CPU.

XLA has none that reads bfloat16 or int8 at the memory's speed. A sum that is written out term by
term is one loop over its elements, in which a number becomes float32 where it is read. So the
product is a few such sums, added up by a product with ones. `x` is not rounded, and sums are of
float32.
"""

from keras import ops

# Terms of a sum. Of more, XLA makes a float32 matrix of bfloat16 first.
MOST_TERMS = 12
VECTOR = 16  # numbers of float32 that a processor computes with at once
# Columns of int8 in a term, and terms. More columns are more sums to write and to add up, more
# terms take longer to compile.
INT8_WIDTHS = (64, 48, 32, 16)
MOST_INT8_TERMS = 64


def is_fast(kernel, layout: str) -> bool:
    """Whether `row_product` is for a matrix of this dtype and these sizes."""
    return kernel.dtype.name in ("bfloat16", "int8") and _num_terms(kernel, layout) > 1


def row_product(x, kernel, layout: str):
    """`x` `(... d)` of one row times `kernel`: `(... e)` float32.

    Args:
        x: tensor. Its leading axes have size 1.
        kernel: bfloat16 or int8 tensor, `(d e)` or, with the layout "ed", `(e d)`.
        layout: string.
    """
    from jax import lax

    num_terms = _num_terms(kernel, layout)
    # A matrix that seems to change with `x` is not converted before a loop.
    x, kernel = lax.optimization_barrier((x, kernel))
    sums = _of_columns if layout == "ed" else _of_rows
    y = sums(ops.cast(ops.reshape(x, (-1,)), "float32"), kernel, num_terms)
    return ops.reshape(y, (*x.shape[:-1], -1))


def _num_terms(kernel, layout: str) -> int:
    """Which divide the matrix into equal parts; 0 if no number does."""
    d, unit = (kernel.shape[0], 1) if layout == "de" else (kernel.shape[1], VECTOR)
    counts = [n for n in range(MOST_TERMS, 0, -1) if d % (n * unit) == 0]
    if layout == "ed" and kernel.dtype.name == "int8":
        counts = [d // w for w in INT8_WIDTHS if d % w == 0 and d // w <= MOST_INT8_TERMS]
    return next(iter(counts), 0)


def _of_rows(x, kernel, num_terms: int):
    d, e = kernel.shape
    x = _as_buffer(x, num_terms)
    parts = _as_float32(ops.reshape(kernel, (-1, num_terms, e)))
    sums = sum(ops.cast(parts[:, i], "float32") * x[:, i, None] for i in range(num_terms))
    return ops.matmul(ops.ones(d // num_terms), sums)


def _of_columns(x, kernel, num_terms: int):
    width = kernel.shape[1] // num_terms
    x, kernel = _as_buffer(x, width), _as_float32(kernel)
    parts = (kernel[:, i * width : (i + 1) * width] for i in range(num_terms))
    return ops.matmul(
        sum(ops.cast(p, "float32") * x[i] for i, p in enumerate(parts)), ops.ones(width)
    )


def _as_buffer(x, width: int):
    """`x` in rows of `width`, by a product: XLA would compute anew for each sum what made it."""
    return ops.matmul(ops.reshape(x, (-1, width)), ops.eye(width))


def _as_float32(matrix):
    """bfloat16 by its bits, the upper half of a float32's: XLA cuts it into no parts.

    int8 stays, for its parts to be converted.
    """
    from jax import lax
    from jax import numpy as jnp

    if matrix.dtype != jnp.bfloat16:
        return matrix
    bits = lax.bitcast_convert_type(matrix, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(bits, jnp.float32)
