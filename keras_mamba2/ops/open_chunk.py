"""SSD over an open chunk: tokens that were read after a state, and are not part of it yet.

Notation: `ops/ssd.py`. An open chunk has q places. Its tokens can be taken back, since the state
is not written: outputs are read from the state before the chunk and from the tokens in it, and
`commit_chunk` makes the first of them part of the state.
"""

from keras import ops

from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.ops.ssd import chunk_decays
from keras_mamba2.ops.ssd import chunk_states
from keras_mamba2.ops.ssd import inter_chunk_output
from keras_mamba2.ops.ssd import intra_chunk_output
from keras_mamba2.ops.ssd import log_decays


def open_chunk_output(x, dt, A, B, C, D=None, *, state, start):
    """The outputs of t tokens of an open chunk, from place `start` on.

    Args:
        x: tensor `(b q h p)`, of the tokens in the chunk, as in `ssd`. What stands after the t
            tokens is ignored.
        dt: tensor `(b q h)`.
        A: tensor `(h)`.
        B: tensor `(b q g n)`.
        C: tensor `(b t g n)`, of the t tokens.
        D: optional tensor `(h)`.
        state: tensor `(b h p n)`, before the chunk.
        start: int, or int scalar.

    Returns:
        Tensor `(b t h p)` in the dtype of `x`.
    """
    h, p = x.shape[2:]
    t, g, n = C.shape[1:]
    dtype = float32_at_least(x.dtype)
    decay = chunk_decays(_log_decay(dt, A, g))
    within = tokens_from(decay.within, start, t, axis=4)  # (b 1 g r t q)
    from_start = tokens_from(decay.from_start, start, t, axis=4)  # (b 1 g r t)

    B, C = (ops.cast(a, dtype)[:, None] for a in (B, C))
    y = intra_chunk_output(_xdt(x, dt, g), B, C, within)
    states = ops.reshape(ops.cast(state, dtype), (-1, 1, g, h // g, p, n))
    y = ops.reshape(y + inter_chunk_output(C, states, from_start), (-1, t, h, p))
    if D is not None:
        y = y + ops.cast(tokens_from(x, start, t), dtype) * ops.cast(D, dtype)[:, None]
    return ops.cast(y, x.dtype)


def commit_chunk(x, dt, A, B, *, state, count):
    """The state `(b h p n)` after the first `count` `(b)` tokens of an open chunk."""
    q, h, p = x.shape[1:]
    g, n = B.shape[2:]
    dtype = float32_at_least(x.dtype)
    is_taken = ops.arange(q, dtype="int32") < count[:, None]  # (b q)
    dt = ops.cast(dt, dtype) * ops.cast(is_taken, dtype)[..., None]
    decay = chunk_decays(_log_decay(dt, A, g))
    new = chunk_states(_xdt(x, dt, g), ops.cast(B, dtype)[:, None], decay.to_end)
    new = ops.reshape(new, (-1, h, p, n))
    across = ops.reshape(decay.across, (-1, h, 1, 1))
    return ops.cast(state, dtype) * across + new


def put_tokens(chunk, new, start, axis: int = 1):
    """`chunk` `(b q ...)` with `new` `(b t ...)` from place `start` on."""
    starts = [0] * len(chunk.shape)
    starts[axis] = start
    return ops.slice_update(chunk, tuple(starts), ops.cast(new, chunk.dtype))


def tokens_from(chunk, start, t: int, axis: int = 1):
    """The t places of `chunk` `(b q ...)` from `start` on."""
    starts, sizes = [0] * len(chunk.shape), list(ops.shape(chunk))
    starts[axis], sizes[axis] = start, t
    return ops.slice(chunk, tuple(starts), tuple(sizes))


def _log_decay(dt, A, g):
    dtype = float32_at_least(dt.dtype)
    log_decay = log_decays(ops.cast(dt, dtype), ops.cast(A, dtype))
    return ops.reshape(log_decay, (-1, 1, dt.shape[1], g, dt.shape[2] // g))  # (b 1 q g r)


def _xdt(x, dt, g):
    dtype = float32_at_least(x.dtype)
    q, h, p = x.shape[1:]
    xdt = ops.cast(x, dtype) * ops.cast(dt, dtype)[..., None]
    return ops.reshape(xdt, (-1, 1, q, g, h // g, p))  # (b 1 q g r p)
