import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import ClassVar

import keras
from keras import ops
from keras import tree

from keras_mamba2.arguments import check_keywords
from keras_mamba2.host.room import LEAST_ROOM
from keras_mamba2.layers.experts_projection import AnyProjection


@dataclasses.dataclass(frozen=True)
class StateTensor:
    """What one tensor of a state is, without its batch axis.

    Args:
        shape: tuple of ints.
        dtype: string.
        room_axis: int, the axis of `shape` along which there is room for a number of tokens, of
            which the state's `length` are there. `None` for a tensor of one size.
    """

    shape: tuple[int | None, ...]
    dtype: str
    room_axis: int | None = None


class Sublayer(keras.layers.Layer):
    """What stands in a residual block: a mixer, attention, an MLP, experts.

    The base class of all of them, and the only thing that backbone, state files, LoRA,
    quantization and layouts know of them. A subclass computes the same function in three ways,
    which agree up to rounding:

    - `call(x, mask, segment_ids)`: a sequence `(b t d)` to a sequence;
    - `call_with_state(x, state, mask, segment_ids)`: the same after a state, and the state after;
    - `step(x, state, mask)`: one token `(b d)` after a state, and the state after.

    It names its state in `state_spec`. One without a state has the empty tuple.

    Tokens that may be taken back are read into an open chunk instead, a few places after a state
    that stays as it is (`ops/open_chunk.py`):

    - `extend(x, state, chunk, start)`: more tokens `(b t d)` from place `start` of the chunk on;
    - `commit(state, chunk, count)`: the state after the first `count` `(b)` tokens of the chunk.
    """

    # How tensors are cut over devices: the end of a path -> the axis of each dimension, of
    # "batch", "sequence", "model" (heads) and "weights" (an axis whose devices share weights).
    layouts: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}
    # Attributes that name the dtypes of a state: see `models/kept_dtypes.py`.
    kept_dtypes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **kwargs):
        check_keywords(type(self), kwargs)
        super().__init__(**kwargs)

    def call(self, x, mask=None, segment_ids=None):
        return self.call_with_state(x, mask=mask, segment_ids=segment_ids)[0]

    def compute_output_shape(self, x_shape) -> tuple[int | None, ...]:
        return tuple(x_shape)

    def compute_output_spec(self, x, mask=None, segment_ids=None, training=None):
        return keras.KerasTensor(self.compute_output_shape(x.shape), dtype=self.compute_dtype)

    def call_with_state(self, x, state=None, mask=None, segment_ids=None) -> tuple[Any, Any]:
        """Returns the output for `x` `(b t d)` after `state`, and the state after `x`."""
        raise NotImplementedError

    def step(self, x, state, mask=None) -> tuple[Any, Any]:
        """Returns the output for one token `x` `(b d)` after `state`, and the state after it.

        Where the boolean `mask` `(b)` is false, the state stays as it was.
        """
        raise NotImplementedError

    def state_spec(self, max_length: int | None = None) -> Any:
        """The `StateTensor` of each tensor of the state, in the state's own structure.

        Args:
            max_length: int, how many tokens the state must have room for, where its size depends
                on that. `None` leaves that size open.
        """
        return ()

    def initial_state(self, batch_size: int, max_length: int | None = None) -> Any:
        """The state before the first token: zeros. Without `max_length` there is little room."""
        return tree.map_structure(
            lambda spec: ops.zeros((batch_size, *spec.shape), spec.dtype),
            self.state_spec(max_length or LEAST_ROOM),
        )

    def extend(self, x, state, chunk, start) -> tuple[Any, Any]:
        """Returns the output for `x` `(b t d)` at the places `start` to `start + t` of `chunk`.

        Args:
            x: tensor `(b t d)`.
            state: before the chunk.
            chunk: of `open_chunk`, or returned by `extend`.
            start: int, or int scalar, how many tokens are in the chunk.

        Returns:
            Tuple `(y, chunk)`: `(b t d)`, and the chunk with the new tokens.
        """
        raise NotImplementedError

    def commit(self, state, chunk, count) -> Any:
        """Returns the state after the first `count` `(b)` tokens of `chunk`."""
        raise NotImplementedError

    def chunk_spec(self, size: int) -> Any:
        """The `StateTensor` of each tensor of an open chunk with `size` places."""
        return ()

    def open_chunk(self, batch_size: int, size: int) -> Any:
        """An open chunk without tokens."""
        return tree.map_structure(
            lambda spec: ops.zeros((batch_size, *spec.shape), spec.dtype), self.chunk_spec(size)
        )

    @property
    def projections(self) -> Sequence[AnyProjection]:
        """The matrices that LoRA adapts and `quantize` quantizes."""
        return ()

    @property
    def weight_axes(self) -> Mapping[str, Mapping[str, int]]:
        """The weights that devices may cut: the end of a path -> what its axes are -> sizes."""
        return {}
