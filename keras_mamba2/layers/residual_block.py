from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_mamba2._compat.keras_layers import keras_mask
from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import POSITIVE
from keras_mamba2.arguments import RATE
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import check_keywords
from keras_mamba2.arguments import number
from keras_mamba2.layers.experts_projection import AnyProjection
from keras_mamba2.layers.gated_rms_normalization import GatedRMSNormalization
from keras_mamba2.layers.sublayer import Sublayer
from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.ops.segments import document_segments


class ResidualBlock(keras.layers.Layer):
    """A residual block, `x + residual_multiplier * sublayer(norm(x))`.

    A subclass makes the sublayer.

    Args:
        hidden_dim: int, d, the size of the residual stream.
        residual_in_fp32: bool, whether the residual stream is float32 whatever the dtype
            policy. If so, the output is float32.
        dropout: float, the rate at which the sublayer's output is dropped in training.
        remat: bool, whether norm and sublayer are computed again in the backward pass instead of
            being stored.
        layer_norm_epsilon: float.
        residual_multiplier: float, what is added to the residual stream is multiplied by it.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: tensor `(b t d)`.
        padding_mask: optional tensor `(b t)`, non-zero at real tokens.
        segment_ids: optional int tensor `(b t)`, numbers of the documents of a packed row: what
            the sublayer remembers is forgotten where the number changes.
        embeddings: tensor `(b t d)`, the input of the first block, for blocks that see it too.
    """

    sees_embeddings = False

    def __init__(
        self,
        hidden_dim: int,
        residual_in_fp32: bool = True,
        dropout: float = 0.0,
        remat: bool = False,
        layer_norm_epsilon: float = 1e-5,
        residual_multiplier: float = 1.0,
        **kwargs,
    ):
        check_keywords(type(self), kwargs)
        # The residual stream may be wider than the compute dtype, so it is not cast.
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        self.hidden_dim = hidden_dim
        self.residual_in_fp32 = residual_in_fp32
        self.dropout = dropout
        self.remat = remat
        self.layer_norm_epsilon = layer_norm_epsilon
        self.residual_multiplier = residual_multiplier
        check_attributes(
            self,
            hidden_dim=SIZE,
            residual_in_fp32=BOOLEAN,
            dropout=RATE,
            remat=BOOLEAN,
            layer_norm_epsilon=POSITIVE,
            residual_multiplier=number(),
        )
        self.norm = GatedRMSNormalization(
            epsilon=layer_norm_epsilon, dtype=self.dtype_policy, name="norm"
        )
        self.dropout_layer = keras.layers.Dropout(dropout, dtype=self.dtype_policy, name="dropout")

    @property
    def sublayer(self) -> Sublayer:
        raise NotImplementedError

    @property
    def parts(self) -> tuple[Sublayer, ...]:
        """All sublayers of the block."""
        return (self.sublayer,)

    def build(
        self, x_shape, padding_mask_shape=None, segment_ids_shape=None, embeddings_shape=None
    ):
        self.norm.build(x_shape)
        if not self.sublayer.built:  # built: made from a configuration
            self.sublayer.build(x_shape)

    def call(self, x, padding_mask=None, segment_ids=None, embeddings=None):
        # As that of an `Embedding` with `mask_zero=True`, for a block in another model.
        padding_mask = keras_mask(x) if padding_mask is None else padding_mask

        def inside(x, embeddings):
            return self.branch(x, embeddings, *_standard(padding_mask, segment_ids))

        return self._add(x, self.dropout_layer(self._run(inside, x, embeddings)))

    def call_with_state(
        self, x, state=None, padding_mask=None, segment_ids=None, embeddings=None
    ) -> tuple[Any, Any]:
        """Returns the output for `x` `(b t d)` after `state`, and the state after `x`."""

        def inside(x, state, embeddings):
            masks = _standard(padding_mask, segment_ids)
            return self.branch_with_state(x, state, embeddings, *masks)

        y, state = self._run(inside, x, state, embeddings)
        return self._add(x, self.dropout_layer(y)), state

    def step(self, x, state, mask=None, embeddings=None) -> tuple[Any, Any]:
        """Returns the output for one token `x` `(b d)` after `state`, and the state after it.

        Where the boolean `mask` `(b)` is false, the state stays as it was.
        """
        y, state = self.branch_step(x, state, embeddings, mask)
        return self._add(x, y), state

    def extend(self, x, state, chunk, start, embeddings=None) -> tuple[Any, Any]:
        """See `Sublayer.extend`."""
        y, chunk = self.branch_extend(x, state, chunk, start, embeddings)
        return self._add(x, y), chunk

    def commit(self, state, chunk, count) -> Any:
        """See `Sublayer.commit`."""
        return self.sublayer.commit(state, chunk, count)

    # What is added to the residual stream, in the ways of a `Sublayer`.

    def branch(self, x, embeddings, mask, segment_ids):
        return self.sublayer(self.norm(x), mask=mask, segment_ids=segment_ids)

    def branch_with_state(self, x, state, embeddings, mask, segment_ids):
        return self.sublayer.call_with_state(self.norm(x), state, mask, segment_ids)

    def branch_step(self, x, state, embeddings, mask):
        return self.sublayer.step(self.norm(x), state, mask)

    def branch_extend(self, x, state, chunk, start, embeddings):
        return self.sublayer.extend(self.norm(x), state, chunk, start)

    def state_spec(self, max_length: int | None = None) -> Any:
        """See `Sublayer.state_spec`."""
        return self.sublayer.state_spec(max_length)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> Any:
        """See `Sublayer.initial_state`."""
        return self.sublayer.initial_state(batch_size, max_length)

    def open_chunk(self, batch_size: int, size: int) -> Any:
        """See `Sublayer.open_chunk`."""
        return self.sublayer.open_chunk(batch_size, size)

    @property
    def projections(self) -> Sequence[AnyProjection]:
        """See `Sublayer.projections`."""
        return self.sublayer.projections

    def _run(self, inside, *args):
        """`inside(*args)`, computed again in the backward pass if the block does so."""
        if not self.remat:
            return inside(*args)
        given = {i: value for i, value in enumerate(args) if value is not None}

        def inside_of_given(*values):
            now = dict(zip(given, values, strict=True))
            return inside(*(now.get(i) for i in range(len(args))))

        # Without dropout: a function that may be computed twice must not move a random generator.
        # Without `None`, which TensorFlow takes for a number.
        return keras.remat(inside_of_given)(*given.values())

    def _add(self, x, y):
        x, y = ops.cast(x, self.residual_dtype), ops.cast(y, self.residual_dtype)
        return x + (y if self.residual_multiplier == 1 else y * self.residual_multiplier)

    @property
    def residual_dtype(self) -> str:
        return float32_at_least(self.compute_dtype) if self.residual_in_fp32 else self.compute_dtype

    def compute_output_shape(self, x_shape) -> tuple[int | None, ...]:
        return tuple(x_shape)

    def compute_output_spec(
        self, x, padding_mask=None, segment_ids=None, embeddings=None, training=None
    ):
        return keras.KerasTensor(x.shape, dtype=self.residual_dtype)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "hidden_dim": self.hidden_dim,
                "residual_in_fp32": self.residual_in_fp32,
                "dropout": self.dropout,
                "remat": self.remat,
                "layer_norm_epsilon": self.layer_norm_epsilon,
                "residual_multiplier": self.residual_multiplier,
            }
        )
        return config


def _standard(padding_mask, segment_ids):
    """Which positions are real, and which document each belongs to, as sublayers take them."""
    mask = None if padding_mask is None else ops.cast(padding_mask, "bool")
    return mask, None if segment_ids is None else document_segments(segment_ids, mask)
