"""`ssd` over a sequence that is cut between devices. JAX only. Notation: `ops/ssd.py`.

The recurrence is linear in the state, so every device runs its own part from a state of zero. Then
the devices exchange, once, how each part changes a state: a decay `(b h)` and an addition
`(b h p n)`. Each device adds the effect of the parts before its own. Compute and activations are
divided by the number of devices; the size of the exchange does not depend on the length.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from keras import ops

from keras_mamba2.ops.checks import check_ssd_arguments
from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.ops.segments import runs
from keras_mamba2.ops.ssd import log_decays
from keras_mamba2.ops.ssd import split_log_decay
from keras_mamba2.ops.ssd_jax import product
from keras_mamba2.ops.ssd_jax import scale
from keras_mamba2.ops.ssd_jax import ssd


def ssd_sequence_parallel(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    initial_state=None,
    segment_ids=None,
    chunk_size=64,
    *,
    sharding: NamedSharding,
):
    """Computes `ssd` with the positions of a sequence on several devices.

    Args:
        x: tensor `(b t h p)`; the number of devices divides `t`. The others are those of `ssd`.
        sharding: of `x`: its spec names the mesh axes that `b` and `t` are cut along.

    Returns:
        Tuple `(y, final_state)` as of `ssd`; `y` is distributed as `x`.
    """
    check_ssd_arguments(x, dt, A, B, C, D, initial_state, segment_ids, chunk_size)
    batch_axis, sequence_axis = (*sharding.spec, None, None)[:2]
    b, _, h, p = x.shape
    n = B.shape[-1]
    if initial_state is None:
        initial_state = jnp.zeros((b, h, p, n), float32_at_least(x.dtype))
    run = None if segment_ids is None else runs(segment_ids)  # a run may go on across devices
    D = jnp.zeros((h,)) if D is None else D

    def part(x, dt, A, B, C, D, state, run):
        return ssd_part(x, dt, A, B, C, D, state, run, chunk_size, sequence_axis)

    sequence, rows = PartitionSpec(batch_axis, sequence_axis), PartitionSpec(batch_axis)
    whole = PartitionSpec()
    arguments = [*map(ops.convert_to_tensor, (x, dt, A, B, C, D, initial_state)), run]
    return jax.shard_map(
        part,
        mesh=sharding.mesh,
        in_specs=(sequence, sequence, whole, sequence, sequence, whole, rows, sequence),
        out_specs=(sequence, rows),
        check_vma=False,  # all devices compute the same final state, which JAX cannot see
    )(*arguments)


def ssd_part(x, dt, A, B, C, D, state, run, chunk_size, axis):
    """The outputs of this device's positions, and the state after all devices'."""
    y, added = ssd(x, dt, A, B, C, D, segment_ids=run, chunk_size=chunk_size)
    decay = decay_from_start(dt, A, state.dtype)  # (b t h)
    if run is not None:
        size = lax.axis_size(axis)
        last_before = lax.ppermute(run[:, -1], axis, [(i, i + 1) for i in range(size - 1)])
        last_before = jnp.where(lax.axis_index(axis) == 0, run[:, 0], last_before)
        decay = jnp.where((run == last_before[:, None])[..., None], decay, 0.0)

    before, final_state = pass_between_devices(decay[:, -1], added, state, axis)
    b, g = B.shape[0], B.shape[2]
    before = before.reshape(b, g, -1, *before.shape[2:])  # (b g r p n)
    from_before = product("btgn,bgrpn->btgrp", C, before).reshape(x.shape)
    return (y + scale(from_before, decay)).astype(x.dtype), final_state


def decay_from_start(dt, A, dtype):
    """How much of the state before is left at each position, `(b t h)`."""
    coarse, fine = split_log_decay(log_decays(dt.astype(dtype), A.astype(dtype)))
    return jnp.exp(jnp.minimum(jnp.cumsum(coarse, axis=1) + jnp.cumsum(fine, axis=1), 0.0))


def pass_between_devices(decay, added, state, axis):
    """The states before this device's part and after the last one's, from `(decay, added)`."""
    decays = lax.all_gather(decay, axis)[..., None, None]  # (devices b h 1 1)
    additions = lax.all_gather(added, axis)  # (devices b h p n)
    before = state
    for device in range(lax.axis_size(axis)):
        before = jnp.where(device == lax.axis_index(axis), state, before)
        state = state * decays[device] + additions[device]
    return before, state
