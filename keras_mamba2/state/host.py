"""States in the memory of the host, without the room that their text has not filled."""

from typing import Any

import numpy as np
from keras import ops
from keras import tree

from keras_mamba2.host.state_file import filled
from keras_mamba2.state.mamba2_state import Mamba2State


def on_host(state: Mamba2State, backbone) -> Mamba2State:
    """A copy of the state of one row as arrays of numpy."""
    length = int(ops.convert_to_numpy(state.length)[0])

    def copied(leaf, spec):
        return np.array(filled(np.asarray(ops.convert_to_numpy(leaf)), spec, length))

    return _mapped(copied, state, backbone)


def with_room_on_host(state: Mamba2State, backbone, room: int) -> Mamba2State:
    """A state of `on_host` with room for `room` tokens, as `state.room.with_room`."""

    def padded(leaf, spec):
        if spec.room_axis is None:
            return leaf
        shape = list(leaf.shape)
        shape[spec.room_axis + 1] = room
        larger = np.zeros(shape, leaf.dtype)
        filled(larger, spec, leaf.shape[spec.room_axis + 1])[...] = leaf
        return larger

    return _mapped(padded, state, backbone)


def _mapped(function, state: Mamba2State, backbone) -> Mamba2State:
    specs = tree.flatten(backbone.state_spec())
    leaves: list[Any] = [
        function(leaf, spec) for leaf, spec in zip(tree.flatten(state.layers), specs, strict=True)
    ]
    counts = [np.array(ops.convert_to_numpy(c)) for c in (state.token, state.length, state.digest)]
    return Mamba2State(tree.pack_sequence_as(state.layers, leaves), *counts)
