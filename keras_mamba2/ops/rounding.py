"""Tensors in eight or four bits: whole numbers, with scales that nearly give what they were."""

from typing import Any
from typing import NamedTuple

from keras import ops
from keras import quantizers

LEAST, LARGEST = -8, 7  # of four bits


class Rounded(NamedTuple):
    """A tensor in int8. All numbers along one axis share a scale."""

    rounded: Any  # int8
    scale: Any  # of size 1 along that axis


def rounded(x, axis: int) -> Rounded:
    scale = ops.max(ops.abs(x), axis=axis, keepdims=True) / 127
    return Rounded(ops.cast(ops.round(x / ops.maximum(scale, 1e-30)), "int8"), scale)


class Packed(NamedTuple):
    """Matrices in int4, whose inputs form groups of `group_size`; the last may be smaller.

    In each group each column has its own scale, and its own number that stands for zero.
    """

    packed: Any  # (... in out/2) int8, two columns in a byte
    scale: Any  # (... groups out)
    zero: Any  # (... groups out) int8
    group_size: int


def packed(matrices, group_size: int) -> Packed:
    """Packs `(... in out)` tensors."""
    *leading, n_in, n_out = matrices.shape
    groups = -(-n_in // group_size)
    missing = groups * group_size - n_in
    x = ops.pad(matrices, [*[(0, 0)] * len(leading), (0, missing), (0, 0)])
    x = ops.reshape(x, (*leading, groups, group_size, n_out))
    # Zero must be one of the numbers, also where all weights of a group have one sign.
    low = ops.minimum(ops.min(x, axis=-2, keepdims=True), 0)
    high = ops.maximum(ops.max(x, axis=-2, keepdims=True), 0)
    scale = ops.maximum((high - low) / (LARGEST - LEAST), 1e-30)
    zero = ops.round(-low / scale) + LEAST
    numbers = ops.clip(ops.round(x / scale) + zero, LEAST, LARGEST)
    numbers = ops.reshape(numbers, (*leading, groups * group_size, n_out))[..., :n_in, :]
    numbers, _, _ = quantizers.pack_int4(ops.cast(numbers, "int8"), axis=-1)
    return Packed(numbers, scale[..., 0, :], ops.cast(zero[..., 0, :], "int8"), group_size)


def restored(stored: Rounded | Packed, dtype):
    """What `rounded` and `packed` took, nearly, in `dtype`."""
    if isinstance(stored, Rounded):
        return ops.cast(stored.rounded, dtype) * ops.cast(stored.scale, dtype)
    numbers = quantizers.unpack_int4(stored.packed, stored.scale.shape[-1], axis=-1)
    n_in = numbers.shape[-2]

    def of_rows(a):
        return ops.repeat(ops.cast(a, dtype), stored.group_size, axis=-2)[..., :n_in, :]

    return (ops.cast(numbers, dtype) - of_rows(stored.zero)) * of_rows(stored.scale)
