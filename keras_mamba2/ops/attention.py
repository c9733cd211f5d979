"""Attention of a sequence to itself and to what was before it, in `keras.ops`.

The scores of all queries for all keys are many times what goes in and comes out. So keys are read
part by part, and a softmax is carried along that is not finished: what was summed is scaled again
where a larger score comes. Of the room for keys and values only parts are read that hold some, and
of a causal sequence only what comes before a part of the queries.

Notation: `ops/ssd.py`, but
g key heads     r query heads of each     s keys     p size of a head
"""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops
from keras import tree

from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.ops.platform import on_gpu
from keras_mamba2.ops.rounding import Rounded
from keras_mamba2.ops.rounding import restored

# Of the past so many keys are read at once. On two CPU cores, a block of 512 tokens with 8 heads of
# 64, the room 4096 and 3584 in it: 77 / 68 / 74 ms at 128 / 256 / 512, and 211 with all at once.
PAST_PART = 256
# On a GPU the host waits to decide whether a part is read: fewer parts.
PAST_PART_ON_GPU = 2048
# A sequence is cut into parts of at least so many queries, and into at most so many parts.
LEAST_QUERIES, MOST_PARTS = 128, 8
UNSEEN = -1e30


class Past(NamedTuple):
    """Keys and values that were before a sequence: the first `length` of c places."""

    keys: Any  # (b g c p), or `Rounded`
    values: Any  # (b g c p), or `Rounded`
    length: Any  # (b) int32
    is_seen: Any  # (b t) bool, by which of the queries


class Softmax(NamedTuple):
    """What queries have read so far."""

    most: Any  # (b g t r), the largest score
    total: Any  # (b g t r), the sum of exp(score - most)
    values: Any  # (b g t r p), the sum of values with these weights


def attend(q, keys, values, seen, scale: float, past: Past | None = None, is_causal: bool = False):
    """Softmax attention, in float32 but for the inputs of products.

    Args:
        q: tensor `(b t g r p)`.
        keys: tensor `(b g s p)`, or `Rounded`.
        values: tensor `(b g s p)`, or `Rounded`.
        seen: boolean tensor `(b t s)` or `(1 t s)`, which keys each query sees. Every query must
            see one of these.
        scale: float, scores are multiplied by it.
        past: further keys and values.
        is_causal: bool, whether `seen` says nothing of keys after the query, which are not seen.

    Returns:
        Tensor `(b t g r p)` in the dtype of `q`.
    """
    dtype, t = q.dtype, q.shape[1]
    keys, values = _read(keys, dtype), _read(values, dtype)
    q = ops.transpose(q, (0, 2, 1, 3, 4))  # (b g t r p)
    so_far = _nothing_read(q)
    if past is not None:
        so_far = _with_past(so_far, q, past, scale)
    size = max(LEAST_QUERIES, -(-t // MOST_PARTS)) if is_causal else t
    outputs = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        end = stop if is_causal else keys.shape[2]
        softmax = _with_more(
            Softmax(*(a[:, :, start:stop] for a in so_far)),
            q[:, :, start:stop],
            keys[:, :, :end],
            values[:, :, :end],
            seen[:, start:stop, :end],
            scale,
        )
        outputs.append(softmax.values / softmax.total[..., None])
    y = ops.concatenate(outputs, axis=2) if len(outputs) > 1 else outputs[0]
    return ops.cast(ops.transpose(y, (0, 2, 1, 3, 4)), dtype)


def _nothing_read(q) -> Softmax:
    zeros = ops.zeros_like(q, float32_at_least(q.dtype))
    return Softmax(zeros[..., 0] + UNSEEN, zeros[..., 0], zeros)


def _with_past(so_far: Softmax, q, past: Past, scale: float) -> Softmax:
    c = tree.flatten(past.keys)[0].shape[2]
    size = _past_part(c)

    def read_part(so_far, i):
        start = ops.minimum(i * size, c - size)  # the last part may begin inside the one before
        keys, values = (_read(_cut(a, start, size), q.dtype) for a in (past.keys, past.values))
        place = start + ops.arange(size, dtype="int32")
        is_there = (place >= i * size) & (place < past.length[:, None])  # (b size)
        seen = is_there[:, None] & past.is_seen[..., None]
        return _with_more(so_far, q, keys, values, seen, scale)

    if c == size:
        return read_part(so_far, 0)
    longest = ops.max(past.length)

    def step(so_far, i):
        is_filled = i * size < longest
        return ops.cond(is_filled, lambda: read_part(so_far, i), lambda: so_far), None

    return ops.scan(step, so_far, ops.arange(-(-c // size), dtype="int32"))[0]


def _past_part(c):
    if not isinstance(c, int):
        return c  # an exported program is for any room, and reads all of it
    return min(PAST_PART_ON_GPU if on_gpu() else PAST_PART, c)


def _with_more(so_far: Softmax, q, keys, values, seen, scale: float) -> Softmax:
    _, g, t, r, p = q.shape
    dtype = so_far.total.dtype
    rows = ops.reshape(q, (-1, g, t * r, p))
    scores = product(rows, ops.transpose(keys, (0, 1, 3, 2)), dtype)
    scores = ops.reshape(scores, (-1, g, t, r, keys.shape[2])) * scale
    scores = ops.where(seen[:, None, :, None], scores, UNSEEN)
    # Whatever is subtracted, the result is the same.
    most = ops.stop_gradient(ops.maximum(so_far.most, ops.max(scores, axis=-1)))
    weights, decay = ops.exp(scores - most[..., None]), ops.exp(so_far.most - most)
    total = so_far.total * decay + ops.sum(weights, axis=-1)
    rows = ops.reshape(ops.cast(weights, q.dtype), (-1, g, t * r, keys.shape[2]))
    more = ops.reshape(product(rows, values, dtype), (-1, g, t, r, p))
    return Softmax(most, total, so_far.values * decay[..., None] + more)


def product(x, y, dtype):
    """`x y` in `dtype`, whose sums are in it too, where the backend can say so."""
    if keras.config.backend() != "jax":
        return ops.cast(ops.matmul(x, y), dtype)
    from jax import numpy as jnp

    return jnp.matmul(x, y, preferred_element_type=dtype)


def _read(stored, dtype):
    if not isinstance(stored, Rounded):
        return stored
    return ops.cast(restored(stored, "float32"), dtype)


def _cut(stored, start, size: int):
    def cut(a):
        b, g, _, p = ops.shape(a)
        return ops.slice(a, (0, 0, start, 0), (b, g, size, p))

    return tree.map_structure(cut, stored)
