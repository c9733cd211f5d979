"""Room for tokens in states that keep something of every token: the keys and values of attention.

It is doubled when it is used up, so that few programs are compiled, however long a text becomes.
"""

from typing import Any

from keras import ops
from keras import tree

from keras_mamba2.layers.sublayer import StateTensor


def needs_room(backbone) -> bool:
    """Whether a state grows with the text."""
    return any(spec.room_axis is not None for spec in tree.flatten(backbone.state_spec()))


def room_of(state, backbone) -> int:
    """How many tokens `state` has room for, if it needs room."""
    return next(
        leaf.shape[spec.room_axis + 1]
        for spec, leaf in _tensors(state, backbone)
        if spec.room_axis is not None
    )


def with_room(state, backbone, room: int):
    """`state` with room for `room` tokens, which must not be fewer than it has room for now."""
    leaves = [_padded(leaf, spec.room_axis, room) for spec, leaf in _tensors(state, backbone)]
    layers = tree.pack_sequence_as(state.layers, leaves)
    return type(state)(layers, state.token, state.length, state.digest)


def with_equal_room(leaves):
    """Tensors of one kind, of several states, with the room of the largest."""
    shapes = [tuple(leaf.shape) for leaf in leaves]
    axes = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    for axis in axes[-1:] if axes and axes[-1] > 0 else ():
        room = max(shape[axis] for shape in shapes)
        leaves = [_padded(leaf, axis - 1, room) for leaf in leaves]
    return leaves


def _tensors(state, backbone) -> list[tuple[StateTensor, Any]]:
    specs = tree.flatten(backbone.state_spec())
    return list(zip(specs, tree.flatten(state.layers), strict=True))


def _padded(leaf, axis: int | None, room: int):
    if axis is None:
        return leaf
    widths = [(0, 0)] * len(leaf.shape)
    widths[axis + 1] = (0, room - leaf.shape[axis + 1])
    return ops.pad(leaf, widths)
