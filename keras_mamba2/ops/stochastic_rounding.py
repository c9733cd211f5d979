import math

from keras import ops


def stochastic_round(x, index):
    """`x` in bfloat16, each element up or down with the probabilities that keep its mean.

    A value that is written again and again, a little changed each time, drifts where it is rounded
    to the nearest: changes of less than half a unit in its last place are lost, always. Here they
    arrive in the mean. What bfloat16 represents stays as it is. The gradient is that of `x`.

    Args:
        x: float32 tensor `(b ...)`.
        index: int tensor `(b)`, how often the values of a row were rounded before. The random
            numbers follow from it and from the place in the row.

    Returns:
        bfloat16 tensor `(b ...)`.

    Reference:
        - [Zamirai et al., 2020](https://arxiv.org/abs/2010.06192)
    """
    noise = ops.bitwise_and(_hash(x.shape[1:], index), 0xFFFF)
    # The 16 bits that bfloat16 lacks overflow into those it has with the probability wanted.
    bits = ops.view(ops.stop_gradient(x), "int32") + noise
    rounded = ops.view(ops.bitwise_and(bits, -0x10000), "float32")
    # The difference is exact, and so is the sum: only the gradient is another.
    return ops.cast(x + (rounded - ops.stop_gradient(x)), "bfloat16")


def _hash(shape: tuple[int, ...], index):
    """Random int32 `(b ...)` for the places of `shape`, as MurmurHash3 finishes its own."""
    place = ops.reshape(ops.cast(index, "int32") * _int32(0x9E3779B1), (-1, *[1] * len(shape)))
    for axis, size in enumerate(shape):
        # Not one range in the whole shape: these are computed where they are needed, not read.
        along = ops.arange(size, dtype="int32") * math.prod(shape[axis + 1 :])
        place = place + ops.reshape(along, (1, *[1] * axis, size, *[1] * (len(shape) - axis - 1)))
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        place = ops.bitwise_xor(place, ops.bitwise_and(ops.right_shift(place, 16), 0xFFFF))
        place = place * _int32(multiplier)
    return ops.bitwise_xor(place, ops.bitwise_and(ops.right_shift(place, 16), 0xFFFF))


def _int32(number: int) -> int:
    """The int32 of these 32 bits. Products overflow, as they are meant to."""
    return number - 2**32
