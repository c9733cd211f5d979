"""State space duality (SSD) in `keras.ops`: the readable definition, on every backend.

Notation of the whole package:

    b batch           t sequence length        v vocabulary_size      d hidden_dim
    e inner_dim = h*p h num_heads              p head_dim             n state_dim
    g num_groups (divides h)                   r = h/g heads a group  k conv_kernel_size
    q chunk_size      c number of chunks       l, s  target and source position in a chunk

    x (b t h p)   dt (b t h), after softplus   A (h), negative   B, C (b t g n)   D (h)
    ssm_state (b h p n)   conv_state (b k-1 e+2gn)

The recurrence, for each head (its B and C are those of group `head // r`):

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T
    y_t     = state_t C_t + D x_t

`ssd` computes it chunk by chunk with matrix products (arXiv 2405.21060, Listing 1), `ssd_step`
one token at a time.
"""

from typing import Any
from typing import NamedTuple

from keras import ops

from keras_mamba2.ops.checks import check_ssd_arguments
from keras_mamba2.ops.checks import check_ssd_step_arguments
from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.ops.segments import runs

# So few chunks are passed without a loop, which not every format of exported models has.
UNROLLED = 32


class ChunkDecays(NamedTuple):
    """The decays of inputs and states on the four ways through a chunk.

    `links` returns booleans in the same type: whether a way stays inside one segment.
    """

    within: Any  # from s to l
    from_start: Any  # from the chunk's start to l
    to_end: Any  # from s to the chunk's end
    across: Any  # from the chunk's start to its end


def ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    initial_state=None,
    segment_ids=None,
    chunk_size=64,
):
    """Runs the state space recurrence over a sequence, in chunks.

    Any `t >= 1` and any `chunk_size >= 1` are accepted, and the result does not depend on
    `chunk_size` beyond rounding. Differentiable in every floating point argument.

    Args:
        x: tensor `(b t h p)`, the inputs.
        dt: tensor `(b t h)`, the step sizes after bias, softplus and clip, `>= 0`. A step of
            zero leaves the state as it was, so padding is `dt = 0`.
        A: tensor `(h)`, negative.
        B: tensor `(b t g n)`, input projections; `g` divides `h`.
        C: tensor `(b t g n)`, output projections.
        D: optional tensor `(h)`, the skip connection.
        initial_state: optional tensor `(b h p n)`, zeros if absent. It belongs to the segment
            of the first position.
        segment_ids: optional integer tensor `(b t)`. The state restarts from zero wherever the
            id differs from the position before.
        chunk_size: int, positions per chunk.

    Returns:
        Tuple `(y, final_state)`: `y` `(b t h p)` in the dtype of `x`, `final_state`
        `(b h p n)` in float32.

    Reference:
        - [Dao and Gu, 2024](https://arxiv.org/abs/2405.21060), Listing 1
    """
    check_ssd_arguments(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size)
    b, t, h, p = ops.shape(x)
    g, n = B.shape[2:]
    is_known = isinstance(t, int)  # else a tensor, in a TensorFlow graph
    q = min(chunk_size, t) if is_known else chunk_size
    c = -(-t // q) if is_known else -1
    dtype, state_dtype = x.dtype, float32_at_least(x.dtype)

    dt = ops.cast(dt, state_dtype)
    log_decay = log_decays(dt, ops.cast(A, state_dtype))  # (b t h)
    xdt = ops.cast(ops.cast(x, state_dtype) * dt[..., None], dtype)

    log_decay = _chunk(log_decay, q)  # (b c q h)
    xdt = ops.reshape(_chunk(xdt, q), (b, c, q, g, h // g, p))  # (b c q g r p)
    B, C = _chunk(B, q), _chunk(C, q)  # (b c q g n)
    linked = None if segment_ids is None else links(segment_ids, q)

    decay = chunk_decays(ops.reshape(log_decay, (b, c, q, g, h // g)), linked)
    if initial_state is None:
        state = ops.zeros((b, g, h // g, p, n), state_dtype)
    else:
        state = ops.reshape(ops.cast(initial_state, state_dtype), (b, g, h // g, p, n))

    y = intra_chunk_output(xdt, B, C, decay.within)
    states = chunk_states(xdt, B, decay.to_end)
    states, final_state = pass_states(states, decay.across, state)
    y = y + inter_chunk_output(C, states, decay.from_start)

    y = ops.reshape(y, (b, -1, h, p))[:, :t]
    if D is not None:
        y = y + ops.cast(x, state_dtype) * ops.cast(D, state_dtype)[:, None]
    return ops.cast(y, dtype), ops.reshape(final_state, (b, h, p, n))


def log_decays(dt, A):
    """`dt A`, but no less than where a decay is 0: sums with more would lose what follows."""
    least = -104.0 if ops.dtype(dt) == "float32" else -746.0
    return ops.maximum(dt * A, least)


def split_log_decay(log_decay):
    """Splits `log_decays` into two summands whose sums over a chunk are exact, and small.

    A decay between two positions is the exponential of a difference of cumulative sums.
    Differences of long float32 sums cancel: after a step of -60 a decay of 0.99 would keep
    four digits. Multiples of 2^-9 add up exactly to 2^15, which is more than 256 * 104, and the
    rests below 2^-10 stay small.
    """
    coarse = ops.stop_gradient(ops.round(log_decay * 512.0) / 512.0)
    return coarse, log_decay - coarse


def chunk_decays(log_decay, linked=None):
    """The four decays that a chunk needs, from log_decay `(b c q g r)`."""
    coarse, fine = (
        ops.moveaxis(ops.cumsum(part, axis=2), 2, -1) for part in split_log_decay(log_decay)
    )  # (b c g r q)

    def decay_between(target, source):
        log = (coarse[target] - coarse[source]) + (fine[target] - fine[source])
        # Above the diagonal sums are positive, and rounding may make others so: exp would overflow.
        return ops.exp(ops.where(log <= 0, log, 0.0))

    q = log_decay.shape[2]
    everywhere, end = (..., slice(None)), (..., slice(q - 1, q))
    target, source = (..., slice(None), None), (..., None, slice(None))
    decay = ChunkDecays(
        within=ops.tril(decay_between(target, source)),  # (b c g r l s)
        from_start=ops.exp(coarse + fine),  # (b c g r l)
        to_end=decay_between(end, everywhere),  # (b c g r s)
        across=ops.exp(coarse + fine)[..., -1],  # (b c g r)
    )
    if linked is None:
        return decay
    return ChunkDecays(
        *(
            ops.where(ops.expand_dims(link, (2, 3)), part, 0.0)
            for link, part in zip(linked, decay, strict=True)
        )
    )


def intra_chunk_output(xdt, B, C, decay):
    """What each position gets from its own chunk: `(C B^T * decay) x dt`, `(b c l g r p)`.

    C B^T is computed once per group, not once per head.
    """
    scores = ops.einsum("bclgn,bcsgn->bcgls", C, B)
    weights = ops.cast(ops.cast(scores[:, :, :, None], decay.dtype) * decay, xdt.dtype)
    y = ops.einsum("bcgrls,bcsgrp->bclgrp", weights, xdt)
    return ops.cast(y, decay.dtype)


def chunk_states(xdt, B, decay):
    """The state at the end of each chunk if it starts from zero, `(b c g r p n)`."""
    decay = ops.transpose(decay, (0, 1, 4, 2, 3))[..., None]  # (b c s g r 1)
    decayed = ops.cast(xdt, decay.dtype) * decay
    return ops.einsum("bcsgrp,bcsgn->bcgrpn", decayed, ops.cast(B, decay.dtype))


def pass_states(states, decay, initial_state):
    """Carries the state from chunk to chunk. Returns the state before each, and the last one."""
    c = states.shape[1]
    if isinstance(c, int) and c <= UNROLLED:
        starts, state = [], initial_state
        for i in range(c):
            starts.append(state)
            state = state * decay[:, i, ..., None, None] + states[:, i]
        return ops.stack(starts, axis=1), state

    def step(state, chunk):
        decay, new = chunk[..., :1], chunk[..., 1:]
        return state * decay + new, state

    # As one tensor: TensorFlow's `ops.scan` cannot take two of unknown length.
    decay = decay[..., None, None] * ops.ones_like(states[..., :1])  # (b c g r p 1)
    chunks = ops.concatenate([decay, states], axis=-1)
    final_state, starts = ops.scan(step, initial_state, ops.moveaxis(chunks, 1, 0))
    return ops.moveaxis(starts, 0, 1), final_state


def inter_chunk_output(C, states, decay):
    """What each position gets from the state before its chunk, `(b c l g r p)`."""
    y = ops.einsum("bclgn,bcgrpn->bclgrp", ops.cast(C, states.dtype), states)
    return y * ops.transpose(decay, (0, 1, 4, 2, 3))[..., None]


def _chunk(x, q):
    """Cuts `(b t ...)` into `(b c q ...)`; zeros fill the last chunk."""
    b, t = ops.shape(x)[:2]
    pad = -t % q
    is_known = isinstance(pad, int)  # else a tensor, where TensorFlow traces an unknown length
    if not is_known or pad:
        x = ops.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (len(x.shape) - 2))
    # A known number of chunks stays known: so few are passed without a loop.
    return ops.reshape(x, (b, (t + pad) // q if is_known else -1, q, *x.shape[2:]))


def links(segment_ids, q):
    """The ways through a chunk of `(b t)` segment ids that stay inside one segment."""
    run = runs(segment_ids)  # (b t)
    # `_chunk` pads with zeros. Counted back from the last run, the padding belongs to that run.
    run = run[:, -1:, None] - _chunk(run[:, -1:] - run, q)  # (b c q)
    last = run[:, :, -1:]
    before = ops.concatenate([ops.zeros_like(last[:, :1]), last[:, :-1]], axis=1)
    return ChunkDecays(
        within=run[..., :, None] == run[..., None, :],  # (b c l s)
        from_start=run == before,  # (b c l)
        to_end=run == last,  # (b c s)
        across=(last == before)[..., 0],  # (b c)
    )


def ssd_step(x, dt, A, B, C, D=None, *, state):
    """Runs the recurrence of `ssd` for one token.

    Args:
        x: tensor `(b h p)`.
        dt: tensor `(b h)`.
        A: tensor `(h)`.
        B: tensor `(b g n)`.
        C: tensor `(b g n)`.
        D: optional tensor `(h)`.
        state: tensor `(b h p n)`, the state after the previous token.

    Returns:
        Tuple `(y, state)`: `y` `(b h p)` in the dtype of `x`, `state` `(b h p n)` in float32.
    """
    check_ssd_step_arguments(x, dt, A, B, C, D, state)
    h, g = x.shape[1], B.shape[1]
    state_dtype = float32_at_least(x.dtype)
    X = ops.cast(x, state_dtype)
    dt = ops.cast(dt, state_dtype)
    B = ops.repeat(ops.cast(B, state_dtype), h // g, axis=1)  # (b h n)
    C = ops.repeat(ops.cast(C, state_dtype), h // g, axis=1)  # (b h n)

    decay = ops.exp(dt * ops.cast(A, state_dtype))[..., None, None]  # (b h 1 1)
    new = (X * dt[..., None])[..., None] * B[:, :, None]  # (b h p n)
    state = ops.cast(state, state_dtype) * decay + new
    y = ops.einsum("bhpn,bhn->bhp", state, C)
    if D is not None:
        y = y + X * ops.cast(D, state_dtype)[:, None]
    return ops.cast(y, x.dtype), state
