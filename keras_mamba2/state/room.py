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


def with_equal_room(states):
    """The leaves of several states, each with the room of the largest.

    Without a model, which would know it, room is what differs alone, and not in a last axis.

    Raises:
        ValueError: for states of different models.
    """
    rows = [tree.flatten(state) for state in states]
    if len(set(map(len, rows))) > 1:
        raise ValueError("The states to concatenate have different numbers of layers.")
    found, rooms = [], set()
    for leaves in zip(*rows, strict=True):
        shapes = [tuple(leaf.shape[1:]) for leaf in leaves]
        if len(set(shapes)) > 1:
            sizes = list(zip(*shapes, strict=False))
            axes = [axis for axis, among in enumerate(sizes) if len(set(among)) > 1]
            rooms |= {sizes[axis] for axis in axes}
            if len(axes) != 1 or axes[0] == len(sizes) - 1 or len(rooms) > 1:
                raise ValueError(
                    "The states to concatenate belong to different models. Received: tensors of "
                    f"shapes {' and '.join(map(str, dict.fromkeys(shapes)))}, without their rows"
                )
            leaves = [_padded(leaf, axes[0], max(sizes[axes[0]])) for leaf in leaves]
        found.append(leaves)
    return found


def _tensors(state, backbone) -> list[tuple[StateTensor, Any]]:
    specs = tree.flatten(backbone.state_spec())
    return list(zip(specs, tree.flatten(state.layers), strict=True))


def _padded(leaf, axis: int | None, room: int):
    if axis is None:
        return leaf
    widths = [(0, 0)] * len(leaf.shape)
    widths[axis + 1] = (0, room - leaf.shape[axis + 1])
    return ops.pad(leaf, widths)
