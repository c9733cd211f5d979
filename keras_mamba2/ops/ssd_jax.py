"""`ssd` and `ssd_step` on JAX: the same two operations, written for what XLA makes of them.

Definition, notation and docstrings: `ops/ssd.py`, to which these are tested equal. What differs:

- One `scan` goes over the chunks and carries the state, so that the (l s) arrays of one chunk
  stay in the cache and memory does not grow with their number.
- Products that share B or C between heads keep the order of the memory: one product serves the
  r heads of a group. Only the (l s) product, which differs by head, is head-first.
- The gradient is written out. All decays of a chunk are exp(S_l - S_s) of one cumulative sum S,
  so the gradient of S needs no (l s) array: dS_l = <dy_l, y_l> - <dx_l, x_l>.
- Sums are products with ones: of a cumsum or a sum over an inner axis XLA on CPU makes loops
  that are ten times slower, and it computes a cumsum anew for every element it is fused with.
"""

from typing import Any
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from keras import ops

from keras_mamba2.ops.checks import check_ssd_arguments
from keras_mamba2.ops.checks import check_ssd_step_arguments
from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.ops.ssd import links
from keras_mamba2.ops.ssd import split_log_decay


class Chunk(NamedTuple):
    """One chunk of every input; for `scan`, all chunks stacked."""

    xdt: Any  # (b q g r p)
    B: Any  # (b q g n)
    C: Any  # (b q g n)
    log_decay: Any  # (2 b q g r), as an exact and a small part
    linked: Any  # None, or `ops.ssd.ChunkDecays` of booleans


def ssd(x, dt, A, B, C, D=None, initial_state=None, segment_ids=None, chunk_size=64):
    check_ssd_arguments(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size)
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    q, r = min(chunk_size, t), h // g
    state_dtype = float32_at_least(x.dtype)
    x, B, C = (ops.convert_to_tensor(a) for a in (x, B, C))
    dt, A = (ops.convert_to_tensor(a, state_dtype) for a in (dt, A))

    def chunks(a, *shape):  # (b t ...) -> (c b q *shape)
        a = jnp.pad(a, [(0, 0), (0, -t % q)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(b, -1, q, *shape), 1, 0)

    linked = None
    if segment_ids is not None:
        linked = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), links(segment_ids, q))
    if initial_state is None:
        state = jnp.zeros((b, g, n, r, p), state_dtype)
    else:
        state = ops.convert_to_tensor(initial_state, state_dtype).reshape(b, g, r, p, n)
        state = jnp.moveaxis(state, -1, 2)  # (b g n r p)
    xdt = scale(x.astype(state_dtype), dt).astype(x.dtype)
    log_decay = chunks(dt * A, g, r)
    log_decay = jnp.stack(split_log_decay(log_decay), axis=1)

    state, y = lax.scan(
        ssd_chunk,
        state,
        Chunk(chunks(xdt, g, r, p), chunks(B, g, n), chunks(C, g, n), log_decay, linked),
    )
    y = jnp.moveaxis(y, 0, 1).reshape(b, -1, h, p)[:, :t]
    if D is not None:
        D = ops.convert_to_tensor(D, state_dtype)
        y = y + scale(x.astype(state_dtype), jnp.broadcast_to(D, (b, t, h)))
    return y.astype(x.dtype), jnp.moveaxis(state, 2, -1).reshape(b, h, p, n)


@jax.custom_vjp
def ssd_chunk(state, chunk):
    """State `(b g n r p)` and `Chunk` in; the state after it and its output `(b l g r p)` out."""
    to_end, from_start, across, within, scores = decays_and_scores(chunk)
    weights = (scores[:, :, None] * within).astype(chunk.xdt.dtype)  # (b g r l s)
    y = product("bgrls,bgrsp->bgrlp", weights, jnp.moveaxis(chunk.xdt, 1, 3))
    y = jnp.moveaxis(y, 3, 1) + scale(product("blgn,bgnrp->blgrp", chunk.C, state), from_start)
    new = product("bsgn,bsgrp->bgnrp", chunk.B, scale(chunk.xdt, to_end))
    return state * across + new, y


def ssd_chunk_forward(state, chunk):
    new_state, y = ssd_chunk(state, chunk)
    return (new_state, y), (state, chunk, new_state, y)


def ssd_chunk_backward(saved, gradients):
    state, chunk, new_state, y = saved
    d_state, d_y = gradients
    xdt, B, C = chunk.xdt, chunk.B, chunk.C
    to_end, from_start, across, within, scores = decays_and_scores(chunk)
    q = xdt.shape[1]

    # The inner product: weights = scores * within, y = weights x.
    d_y_heads = jnp.moveaxis(d_y, 1, 3).astype(xdt.dtype)  # (b g r l p)
    weights = (scores[:, :, None] * within).astype(xdt.dtype)
    d_xdt = jnp.moveaxis(product("bgrls,bgrlp->bgrsp", weights, d_y_heads), 3, 1)
    d_weights = product("bgrlp,bgrsp->bgrls", d_y_heads, jnp.moveaxis(xdt, 1, 3))
    d_scores = sum_heads(d_weights * within).astype(C.dtype)  # (b g l s)

    # What came from the state before, and what went into the state after.
    d_y_decayed = scale(d_y, from_start)
    d_xdt = d_xdt + scale(product("bsgn,bgnrp->bsgrp", B, d_state), to_end)
    d_B = product("bgls,blgn->bsgn", d_scores, C)
    d_B = d_B + product("bgnrp,bsgrp->bsgn", d_state, scale(xdt, to_end))
    d_C = product("bgls,bsgn->blgn", d_scores, B)
    d_C = d_C + product("bgnrp,blgrp->blgn", state, d_y_decayed)
    d_old_state = product("blgn,blgrp->bgnrp", C, d_y_decayed) + d_state * across

    # Every term of y_l has the factor exp(S_l), every term of x_s the factor exp(-S_s).
    d_sums = sum_last(d_y * y) - sum_last(d_xdt * xdt.astype(d_xdt.dtype))  # (b q g r)
    d_end = jnp.einsum("bgnrp,bgnrp->bgr", d_state, new_state)
    d_sums = d_sums.at[:, -1].add(d_end)
    ones = jnp.tril(jnp.ones((q, q), d_sums.dtype))
    d_log_decay = jnp.einsum("blgr,ls->bsgr", d_sums, ones, precision=lax.Precision.HIGHEST)
    d_chunk = Chunk(
        d_xdt.astype(xdt.dtype),
        d_B.astype(B.dtype),
        d_C.astype(C.dtype),
        jnp.stack([jnp.zeros_like(d_log_decay), d_log_decay]),
        None,
    )
    return d_old_state, d_chunk


ssd_chunk.defvjp(ssd_chunk_forward, ssd_chunk_backward)


def decays_and_scores(chunk):
    """The decays of `ops.ssd.ChunkDecays`, cut at segments, and the scores C B^T `(b g l s)`."""
    q = chunk.xdt.shape[1]
    causal = jnp.tril(jnp.ones((q, q), bool))
    ones = causal.astype(chunk.log_decay.dtype)
    # HIGHEST: on TPU the default would round the summands to bfloat16.
    sums = jnp.einsum("kbsgr,ls->kbgrl", chunk.log_decay, ones, precision=lax.Precision.HIGHEST)
    to_end = jnp.moveaxis(decay_between(sums[..., -1:], sums), -1, 1)  # (b s g r)
    from_start = jnp.moveaxis(jnp.exp(sums[0] + sums[1]), -1, 1)  # (b l g r)
    across = from_start[:, -1]  # (b g r)
    within = decay_between(sums[..., :, None], sums[..., None, :])  # (b g r l s)
    if chunk.linked is not None:
        to_end = jnp.where(chunk.linked.to_end[..., None, None], to_end, 0.0)
        from_start = jnp.where(chunk.linked.from_start[..., None, None], from_start, 0.0)
        across = jnp.where(chunk.linked.across[:, None, None], across, 0.0)
        causal = causal & chunk.linked.within[:, None, None]
    scores = product("blgn,bsgn->bgls", chunk.C, chunk.B)
    return to_end, from_start, across[:, :, None, :, None], jnp.where(causal, within, 0.0), scores


def decay_between(target, source):
    log = (target[0] - source[0]) + (target[1] - source[1])
    return jnp.exp(jnp.where(log <= 0, log, 0.0))


def product(equation, a, b):
    """An einsum in the dtype of the inputs, that is the model's, with float32 accumulation."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    accumulate = float32_at_least(dtype)
    return jnp.einsum(equation, a.astype(dtype), b.astype(dtype), preferred_element_type=accumulate)


@jax.custom_vjp
def scale(x, factor):
    """`x * factor[..., None]`, in the wider of the two dtypes."""
    return x * factor[..., None]


def scale_backward(saved, d_y):
    x, factor = saved
    return scale(d_y, factor).astype(x.dtype), sum_last(d_y * x).astype(factor.dtype)


scale.defvjp(lambda x, factor: (scale(x, factor), (x, factor)), scale_backward)


def sum_last(x):
    return jnp.matmul(x, jnp.ones((x.shape[-1], 1), x.dtype), precision="highest")[..., 0]


def sum_heads(x):
    """Sums (b g r l s) over r."""
    b, g, r, l, s = x.shape
    ones = jnp.ones((1, r), x.dtype)
    return jnp.matmul(ones, x.reshape(b, g, r, l * s), precision="highest").reshape(b, g, l, s)


def ssd_step(x, dt, A, B, C, D=None, *, state):
    check_ssd_step_arguments(x, dt, A, B, C, D, state)
    b, h, p = x.shape
    g, n = B.shape[1:]
    state_dtype = float32_at_least(x.dtype)
    X, dt, A, B, C, state = (ops.convert_to_tensor(a, state_dtype) for a in (x, dt, A, B, C, state))

    # Without the barriers XLA on CPU fuses update and readout into one loop, which computes
    # the exponential anew for every element and does not vectorise the sum: ten times slower.
    decay, xdt = lax.optimization_barrier((jnp.exp(dt * A), X * dt[..., None]))
    new = jnp.einsum("bgrp,bgn->bgrpn", xdt.reshape(b, g, h // g, p), B)
    state = state.reshape(new.shape) * decay.reshape(b, g, h // g, 1, 1)
    state = lax.optimization_barrier(state + new)
    y = jnp.einsum("bgrpn,bgn->bgrp", state, C).reshape(b, h, p)
    if D is not None:
        y = y + X * ops.convert_to_tensor(D, state_dtype)[:, None]
    return y.astype(x.dtype), state.reshape(b, h, p, n)
