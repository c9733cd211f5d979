"""`ssd` and `ssd_step` on JAX: the same two operations, in a form that XLA compiles well.

Definition, notation and docstrings: `ops/ssd.py`. Tests compare the two. What differs:

- One loop goes over the chunks and carries the state, so that the (l s) arrays of one chunk
  stay in the cache and memory does not grow with their number. It cuts chunks out of the sequence
  and puts the output in their place. Inputs and outputs of `scan` would be copied, to have the
  chunks first: on a TPU that is half of the memory traffic of a prefill.
- Step sizes and the skip connection are applied in the loop too, so that nothing of the size of
  the sequence is float32 where the model is not.
- Products that share B or C between heads keep the order of the memory: one product serves the
  r heads of a group. Only the (l s) product, which differs by head, is head-first.
- The gradient is written out. All decays of a chunk are exp(S_l - S_s) of one cumulative sum S,
  so the gradient of S needs no (l s) array: dS_l = <dy_l, y_l> - <dx_l, x_l>.
- Sums are products with ones. XLA on CPU compiles a cumsum, or a sum over an inner axis, to loops
  that are ten times slower, and computes a cumsum anew for every element that it is fused with.
"""

import functools
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
from keras_mamba2.ops.ssd import log_decays
from keras_mamba2.ops.ssd import split_log_decay


class Inputs(NamedTuple):
    """The inputs of a sequence, or of one chunk of it."""

    x: Any  # (b t g r p)
    dt: Any  # (b t g r)
    B: Any  # (b t g n)
    C: Any  # (b t g n)
    log_decay: Any  # (b t g r)


def ssd(x, dt, A, B, C, D=None, initial_state=None, segment_ids=None, chunk_size=64):
    check_ssd_arguments(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size)
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    q, r = min(chunk_size, t), h // g
    state_dtype = float32_at_least(x.dtype)
    x, B, C = (ops.convert_to_tensor(a) for a in (x, B, C))
    dt, A = (ops.convert_to_tensor(a, state_dtype) for a in (dt, A))

    def whole_chunks(a, *shape):  # (b t ...) -> (b c*q *shape)
        a = jnp.pad(a, [(0, 0), (0, -t % q)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(b, -1, *shape)

    linked = None if segment_ids is None else links(segment_ids, q)
    if initial_state is None:
        state = jnp.zeros((b, g, n, r, p), state_dtype)
    else:
        state = ops.convert_to_tensor(initial_state, state_dtype).reshape(b, g, r, p, n)
        state = jnp.moveaxis(state, -1, 2)  # (b g n r p)
    if D is not None:
        # A row each: the gradient is summed over rows, which may be on several devices, once and
        # not in every round of the loop.
        D = jnp.broadcast_to(ops.convert_to_tensor(D, state_dtype).reshape(g, r), (b, g, r))
    inputs = Inputs(
        whole_chunks(x, g, r, p),
        whole_chunks(dt, g, r),
        whole_chunks(B, g, n),
        whole_chunks(C, g, n),
        whole_chunks(log_decays(dt, A), g, r),
    )
    state, y = compiled_ssd_chunks(q, D, state, inputs, linked)
    return y.reshape(b, -1, h, p)[:, :t], jnp.moveaxis(state, 2, -1).reshape(b, h, p, n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ssd_chunks(q, D, state, inputs, linked):
    """The state after a sequence of whole chunks, and y `(b t g r p)`.

    Args:
        q: int.
        D: `(b g r)`, or None.
        state: `(b g n r p)`.
        inputs: `Inputs`.
        linked: None, or `ops.ssd.ChunkDecays` of booleans `(b c ...)`.
    """
    return ssd_chunks_forward(q, D, state, inputs, linked)[0]


def ssd_chunks_forward(q, D, state, inputs, linked):
    def step(carry, i):
        state, out = carry  # `out` begins as x, of which each chunk is read, then overwritten
        chunk = cut(inputs._replace(x=out), i, q)
        new_state, y = recurrence(state, chunk, at(linked, i))
        return (new_state, put(out, skip(D, chunk.x, y), i)), (state, y)

    numbers = jnp.arange(inputs.x.shape[1] // q)
    (final_state, out), (starts, y) = lax.scan(step, (state, inputs.x), numbers)
    return (final_state, out), (D, inputs, linked, final_state, starts, y)


def ssd_chunks_backward(q, saved, gradients):
    D, inputs, linked, final_state, starts, y = saved
    d_state, d_out = gradients

    def step(carry, saved_chunk):
        d_state, new_state, d_D, d_inputs = carry
        i, state, y = saved_chunk
        d_more_D, d_state, d_chunk = chunk_gradients(
            D, state, cut(inputs, i, q), at(linked, i), new_state, y, d_state, cut(d_out, i, q)
        )
        d_D = jax.tree.map(jnp.add, d_D, d_more_D)
        return (d_state, state, d_D, put(d_inputs, d_chunk, i)), None

    zeros = jax.tree.map(jnp.zeros_like, (D, inputs))
    numbers = jnp.arange(len(starts))
    (d_state, _, d_D, d_inputs), _ = lax.scan(
        step, (d_state, final_state, *zeros), (numbers, starts, y), reverse=True
    )
    return d_D, d_state, d_inputs, None


ssd_chunks.defvjp(ssd_chunks_forward, ssd_chunks_backward)
# Outside of a compiled program JAX would compile the loop anew in every call. Inside one this
# changes nothing, since it is inlined.
compiled_ssd_chunks = jax.jit(ssd_chunks, static_argnums=0, inline=True)


def cut(arrays, i, q):
    """Chunk `i` of arrays `(b t ...)`."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, i * q, q, axis=1), arrays)


def put(arrays, chunks, i):
    """Arrays `(b t ...)` with chunk `i` in its place."""
    return jax.tree.map(
        lambda a, chunk: lax.dynamic_update_slice_in_dim(a, chunk, i * chunk.shape[1], axis=1),
        arrays,
        chunks,
    )


def at(arrays, i):
    """Entry `i` of arrays `(b c ...)`."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, axis=1, keepdims=False), arrays)


def recurrence(state, chunk, linked):
    """The state after a chunk, and its output `(b l g r p)` without the skip connection."""
    to_end, from_start, across, within, scores = decays_and_scores(chunk, linked)
    xdt = scale_by_dt(chunk)
    weights = (scores[:, :, None] * within).astype(xdt.dtype)  # (b g r l s)
    y = product("bgrls,bgrsp->bgrlp", weights, jnp.moveaxis(xdt, 1, 3))
    y = jnp.moveaxis(y, 3, 1) + scale(product("blgn,bgnrp->blgrp", chunk.C, state), from_start)
    new = product("bsgn,bsgrp->bgnrp", chunk.B, scale(xdt, to_end))
    return state * across + new, y


def skip(D, x, y):
    """`y + D x`, in the dtype of `x`."""
    return (y if D is None else y + scale(x.astype(y.dtype), D[:, None])).astype(x.dtype)


def chunk_gradients(D, state, chunk, linked, new_state, y, d_state, d_y):
    """The gradients of D, of the state before the chunk, and of the chunk.

    `y` is without the skip connection, `d_y` with it.
    """
    x, d_y = chunk.x.astype(y.dtype), d_y.astype(y.dtype)
    xdt, B, C = scale_by_dt(chunk), chunk.B, chunk.C
    to_end, from_start, across, within, scores = decays_and_scores(chunk, linked)
    q = xdt.shape[1]

    # The inner product: weights = scores * within, y = weights x.
    d_y_heads = jnp.moveaxis(d_y, 1, 3).astype(xdt.dtype)  # (b g r l p)
    weights = (scores[:, :, None] * within).astype(xdt.dtype)
    d_xdt = jnp.moveaxis(product("bgrls,bgrlp->bgrsp", weights, d_y_heads), 3, 1)
    d_weights = product("bgrlp,bgrsp->bgrls", d_y_heads, jnp.moveaxis(xdt, 1, 3))
    d_scores = sum_heads(d_weights * within).astype(C.dtype)  # (b g l s)

    # The parts through the state before the chunk, and through the state after it.
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
    d_x, d_D = scale(d_xdt, chunk.dt), None
    if D is not None:
        d_x, d_D = d_x + scale(d_y, D[:, None]), jnp.sum(sum_last(d_y * x), axis=1)
    d_chunk = Inputs(
        d_x.astype(chunk.x.dtype),
        sum_last(d_xdt * x),
        d_B.astype(B.dtype),
        d_C.astype(C.dtype),
        d_log_decay,
    )
    return d_D, d_old_state, d_chunk


def decays_and_scores(chunk, linked):
    """The decays of `ops.ssd.ChunkDecays`, cut at segments, and the scores C B^T `(b g l s)`."""
    q = chunk.x.shape[1]
    causal = jnp.tril(jnp.ones((q, q), bool))
    log_decay = jnp.stack(split_log_decay(chunk.log_decay))
    ones = causal.astype(log_decay.dtype)
    # HIGHEST: on TPU the default would round the summands to bfloat16.
    sums = jnp.einsum("kbsgr,ls->kbgrl", log_decay, ones, precision=lax.Precision.HIGHEST)
    to_end = jnp.moveaxis(decay_between(sums[..., -1:], sums), -1, 1)  # (b s g r)
    from_start = jnp.moveaxis(jnp.exp(sums[0] + sums[1]), -1, 1)  # (b l g r)
    across = from_start[:, -1]  # (b g r)
    within = decay_between(sums[..., :, None], sums[..., None, :])  # (b g r l s)
    if linked is not None:
        to_end = jnp.where(linked.to_end[..., None, None], to_end, 0.0)
        from_start = jnp.where(linked.from_start[..., None, None], from_start, 0.0)
        across = jnp.where(linked.across[:, None, None], across, 0.0)
        causal = causal & linked.within[:, None, None]
    scores = product("blgn,bsgn->bgls", chunk.C, chunk.B)
    return to_end, from_start, across[:, :, None, :, None], jnp.where(causal, within, 0.0), scores


def decay_between(target, source):
    log = (target[0] - source[0]) + (target[1] - source[1])
    return jnp.exp(jnp.where(log <= 0, log, 0.0))


def product(equation, a, b):
    """An einsum in the narrower dtype of the inputs, with float32 accumulation.

    But a float32 state beside float16 stays: it may be beyond what float16 holds.
    """
    choose = max if jnp.float16 in (a.dtype, b.dtype) else min
    dtype = choose(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    accumulate = float32_at_least(dtype)
    return jnp.einsum(equation, a.astype(dtype), b.astype(dtype), preferred_element_type=accumulate)


def scale(x, factor):
    """`x * factor[..., None]`, in the wider of the two dtypes."""
    return x * factor[..., None]


def scale_by_dt(chunk):
    return scale(chunk.x.astype(chunk.dt.dtype), chunk.dt).astype(chunk.x.dtype)


def sum_last(x):
    return jnp.matmul(x, jnp.ones((x.shape[-1], 1), x.dtype), precision="highest")[..., 0]


def sum_heads(x):
    """Sums (b g r l s) over r."""
    b, g, r, l, s = x.shape
    ones = jnp.ones((1, r), x.dtype)
    return jnp.matmul(ones, x.reshape(b, g, r, l * s), precision="highest").reshape(b, g, l, s)


def ssd_step(x, dt, A, B, C, D=None, *, state):
    check_ssd_step_arguments(x, dt, A, B, C, D, state)
    state_dtype = float32_at_least(x.dtype)
    X, dt, A, B, C, state = (ops.convert_to_tensor(a, state_dtype) for a in (x, dt, A, B, C, state))
    y, state = lax.platform_dependent(
        *(state, jnp.exp(dt * A), X * dt[..., None], B, C),
        cpu=read_and_update,
        default=update_and_read,
    )
    if D is not None:
        y = y + X * ops.convert_to_tensor(D, state_dtype)[:, None]
    return y.astype(x.dtype), state


def update_and_read(state, decay, xdt, B, C):
    """One pass over the state, where the compiler fuses the readout with the update."""
    b, h, p, n = state.shape
    by_group = (b, B.shape[1], -1)  # g, r
    new = jnp.einsum("bgrp,bgn->bgrpn", xdt.reshape(*by_group, p), B)
    state = state.reshape(new.shape) * decay.reshape(*by_group, 1, 1) + new
    y = jnp.einsum("bgrpn,bgn->bgrp", state, C)
    return y.reshape(b, h, p), state.reshape(b, h, p, n)


def read_and_update(state, decay, xdt, B, C):
    """The same for a CPU, where the readout is a separate product, here with the old state.

    With the new one XLA would update the state twice, for the readout and for the result, and
    copy it: 3.2 against 1.5 of the 18 ms of a step at 130M. Two more things avoid the copy:
    the update has the state's own shape, and its decay depends on the readout, by a factor of
    zero, so that the old state is read before it is overwritten.
    """
    b, h, p, n = state.shape
    r = h // B.shape[1]
    y = jnp.einsum("bgrpn,bgn->bgrp", state.reshape(b, -1, r, p, n), C).reshape(b, h, p)
    y = y * decay[..., None] + xdt * jnp.repeat(jnp.sum(B * C, -1), r, axis=1)[..., None]
    decay = decay + 0 * lax.stop_gradient(y[..., 0])
    state = state * decay[..., None, None] + xdt[..., None] * jnp.repeat(B, r, axis=1)[:, :, None]
    return y, state
