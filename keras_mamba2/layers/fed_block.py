from typing import Any

import keras
from keras import ops

from keras_mamba2.layers.hybrid_block import HybridBlock
from keras_mamba2.layers.projection import Projection
from keras_mamba2.layers.sublayer import Sublayer


@keras.saving.register_keras_serializable(package="keras_mamba2")
class FedBlock(HybridBlock):
    """A residual block whose sublayer sees more than the residual stream.

    `x + sublayer(norm(x + feeder([x, embeddings])))`: what the feeder makes of the stream and of
    the embeddings of the tokens, side by side, is added to what the sublayer sees, and not to the
    stream itself.

    Args:
        hidden_dim: int, d, the size of the residual stream.
        sublayer: `keras_mamba2.layers.Sublayer`, of the block's dtype.
        feeder: `keras_mamba2.layers.Sublayer` from `(b t 2d)` to `(b t d)`.
        **kwargs: see `keras_mamba2.layers.ResidualBlock`.

    Call arguments:
        x: tensor `(b t d)`.
        padding_mask: see `keras_mamba2.layers.ResidualBlock`.
        segment_ids: as there.
        embeddings: tensor `(b t d)`, the input of the first block.

    Reference:
        - [Glorioso et al., 2024](https://arxiv.org/abs/2405.16712)
    """

    sees_embeddings = True

    def __init__(self, hidden_dim: int, sublayer: Sublayer, feeder: Sublayer, **kwargs):
        super().__init__(hidden_dim, sublayer, **kwargs)
        self.feeder = feeder

    def build(
        self, x_shape, padding_mask_shape=None, segment_ids_shape=None, embeddings_shape=None
    ):
        super().build(x_shape)
        if not self.feeder.built:
            self.feeder.build((*x_shape[:-1], 2 * self.hidden_dim))

    def branch(self, x, embeddings, mask, segment_ids):
        fed = self.feeder(_joined(x, embeddings), mask=mask, segment_ids=segment_ids)
        return super().branch(self._seen(x, fed), embeddings, mask, segment_ids)

    def branch_with_state(self, x, state, embeddings, mask, segment_ids):
        fed_state, state = (None, None) if state is None else state
        fed, fed_state = self.feeder.call_with_state(
            _joined(x, embeddings), fed_state, mask, segment_ids
        )
        y, state = super().branch_with_state(
            self._seen(x, fed), state, embeddings, mask, segment_ids
        )
        return y, (fed_state, state)

    def branch_step(self, x, state, embeddings, mask):
        fed_state, state = state
        fed, fed_state = self.feeder.step(_joined(x, embeddings), fed_state, mask)
        y, state = super().branch_step(self._seen(x, fed), state, embeddings, mask)
        return y, (fed_state, state)

    def branch_extend(self, x, state, chunk, start, embeddings):
        (fed_state, state), (fed_chunk, chunk) = state, chunk
        fed, fed_chunk = self.feeder.extend(_joined(x, embeddings), fed_state, fed_chunk, start)
        y, chunk = super().branch_extend(self._seen(x, fed), state, chunk, start, embeddings)
        return y, (fed_chunk, chunk)

    def commit(self, state, chunk, count) -> Any:
        parts = zip(self.parts, state, chunk, strict=True)
        return tuple(part.commit(state, chunk, count) for part, state, chunk in parts)

    def open_chunk(self, batch_size: int, size: int) -> Any:
        return tuple(part.open_chunk(batch_size, size) for part in self.parts)

    def _seen(self, x, fed):
        return ops.cast(x, self.residual_dtype) + ops.cast(fed, self.residual_dtype)

    @property
    def parts(self) -> tuple[Sublayer, ...]:
        return self.feeder, self.sublayer

    def state_spec(self, max_length: int | None = None) -> Any:
        return tuple(part.state_spec(max_length) for part in self.parts)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> Any:
        return tuple(part.initial_state(batch_size, max_length) for part in self.parts)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(layer for part in self.parts for layer in part.projections)

    def get_config(self):
        feeder = keras.saving.serialize_keras_object(self.feeder)
        return {**super().get_config(), "feeder": feeder}

    @classmethod
    def from_config(cls, config):
        parts = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ("sublayer", "feeder")
        }
        return cls(**{**config, **parts})


def _joined(x, embeddings):
    return ops.concatenate([x, ops.cast(embeddings, x.dtype)], axis=-1)
