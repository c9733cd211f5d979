"""Products of each token with the matrices of its own experts.

Notation: n tokens of size d, k experts for each, of e. The four ways agree up to rounding.
"""

from collections.abc import Callable

import keras
from keras import ops

from keras_mamba2.ops import matrix
from keras_mamba2.ops.rounding import Packed
from keras_mamba2.ops.rounding import Rounded
from keras_mamba2.ops.rounding import restored


def grouped_matmul(x, weights, experts, num_experts: int, compute: Callable):
    """The weighted sum of what the experts of each token compute.

    Args:
        x: tensor `(n d)`.
        weights: tensor `(n k)`, of the experts of a token.
        experts: int tensor `(n k)`, which experts they are.
        num_experts: int, e.
        compute: function of `x` and `matmul`, which multiplies rows by kernels `(e in out)`,
            `Rounded` or `Packed` ones too, each row by that of its expert.

    Returns:
        Tensor `(n d)`.
    """
    n, k = experts.shape
    if n == 1:
        return _sliced(x, weights, experts, compute)
    if n is not None and n * k <= num_experts:
        return _gathered(x, weights, experts, compute)
    if keras.config.backend() == "jax":
        return _sorted(x, weights, experts, num_experts, compute)
    return _all_experts(x, weights, experts, num_experts, compute)


def _sliced(x, weights, experts, compute):
    """For one token: each product reads its expert where it lies, so nothing else is moved."""
    total = 0
    for i in range(experts.shape[1]):

        def matmul(rows, kernels, expert=experts[0, i]):
            def of_expert(kernels):
                return matrix.take_matrix(kernels, expert)

            kernels, scale = _parts(kernels, rows.dtype, of_expert)
            return matrix.matmul(rows, kernels) * scale

        total = total + ops.cast(compute(x, matmul), weights.dtype) * weights[:, i : i + 1]
    return ops.cast(total, x.dtype)


def _gathered(x, weights, experts, compute):
    """For few tokens: reads only the matrices of the chosen experts."""

    def matmul(rows, kernels):
        def of_experts(kernels):
            return matrix.take_rows(kernels, experts)  # (n k in out)

        kernels, scale = _parts(kernels, rows.dtype, of_experts)
        layout = "nd,nkdf->nkf" if len(rows.shape) == 2 else "nkd,nkdf->nkf"
        return ops.einsum(layout, rows, kernels) * (scale if scale is ONE else scale[:, :, 0])

    return _weighted_sum(compute(x, matmul), weights)


def _sorted(x, weights, experts, num_experts: int, compute):
    """Sorts the tokens by expert, so that each expert has one matrix of rows."""
    from jax import lax

    n, k = experts.shape
    flat = ops.reshape(experts, (-1,))
    order = ops.argsort(flat)
    sizes = ops.sum(ops.cast(flat[:, None] == ops.arange(num_experts), "int32"), axis=0)

    def matmul(rows, kernels):
        kernels, scale = _parts(kernels, rows.dtype)
        y = lax.ragged_dot(rows, kernels, sizes)
        return y if scale is ONE else y * ops.take(scale[:, 0], ops.take(flat, order), axis=0)

    y = compute(ops.take(x, order // k, axis=0), matmul)
    y = ops.take(y, ops.argsort(order), axis=0)
    return _weighted_sum(ops.reshape(y, (n, k, -1)), weights)


def _all_experts(x, weights, experts, num_experts: int, compute):
    """Every expert for every token, on backends without a product by groups of rows."""

    def matmul(rows, kernels):
        kernels, scale = _parts(kernels, rows.dtype)
        layout = "nd,edf->nef" if len(rows.shape) == 2 else "ned,edf->nef"
        return ops.einsum(layout, rows, kernels) * (scale if scale is ONE else scale[:, 0])

    y = compute(x, matmul)  # (n e d)
    chosen = ops.one_hot(experts, num_experts, dtype=weights.dtype)  # (n k e)
    return _weighted_sum(y, ops.einsum("nk,nke->ne", weights, chosen))


ONE = 1.0  # for kernels whose products need no scale


def _parts(kernels, dtype, chosen: Callable = lambda kernels: kernels):
    """The chosen kernels in `dtype`, and the scale of their products `(... 1 out)`."""
    if isinstance(kernels, Rounded):
        return ops.cast(chosen(kernels.rounded), dtype), ops.cast(chosen(kernels.scale), dtype)
    if isinstance(kernels, Packed):
        parts = {name: chosen(getattr(kernels, name)) for name in ("packed", "scale", "zero")}
        return restored(kernels._replace(**parts), dtype), ONE
    return chosen(kernels), ONE


def _weighted_sum(y, weights):
    """Over the second axis, in the dtype of the weights."""
    summed = ops.einsum("nkd,nk->nd", ops.cast(y, weights.dtype), weights)
    return ops.cast(summed, y.dtype)
