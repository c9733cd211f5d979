import keras
from keras import ops

from keras_mamba2.layers.gated_rms_normalization import GatedRMSNormalization
from keras_mamba2.layers.mamba2_mixer import Mamba2Mixer
from keras_mamba2.layers.mamba2_mixer import MixerState
from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.ops.segments import segment_ids_of


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2Block(keras.layers.Layer):
    """A residual block, `x + mixer(norm(x))`.

    Args:
        hidden_dim: int, d, the size of the residual stream.
        residual_in_fp32: bool, whether the residual stream is float32 whatever the dtype
            policy. If so, the output is float32.
        dropout: float, the rate at which the mixer's output is dropped in training.
        remat: bool, whether norm and mixer are computed again in the backward pass instead of
            being stored.
        layer_norm_epsilon: float, of both norms.
        dtype: dtype policy.
        name: str.
        **kwargs: the arguments of `keras_mamba2.layers.Mamba2Mixer`.

    Call arguments:
        x: tensor `(b t d)`.
        padding_mask: optional tensor `(b t)`, non-zero at real tokens. Integers also number the
            documents of a packed row: the mixer restarts where the number changes.
    """

    def __init__(
        self,
        hidden_dim: int,
        residual_in_fp32: bool = True,
        dropout: float = 0.0,
        remat: bool = False,
        layer_norm_epsilon: float = 1e-5,
        dtype=None,
        name: str | None = None,
        trainable: bool = True,
        **kwargs,
    ):
        # Not cast at the door: the residual stream may be wider than the compute dtype.
        super().__init__(autocast=False, dtype=dtype, name=name, trainable=trainable)
        self.supports_masking = True
        self.hidden_dim = hidden_dim
        self.residual_in_fp32 = residual_in_fp32
        self.dropout = dropout
        self.remat = remat
        self.layer_norm_epsilon = layer_norm_epsilon
        self.mixer_arguments = kwargs
        self.norm = GatedRMSNormalization(
            epsilon=layer_norm_epsilon, dtype=self.dtype_policy, name="norm"
        )
        self.mixer = Mamba2Mixer(
            hidden_dim,
            layer_norm_epsilon=layer_norm_epsilon,
            dtype=self.dtype_policy,
            name="mixer",
            **kwargs,
        )
        self.dropout_layer = keras.layers.Dropout(dropout, dtype=self.dtype_policy, name="dropout")

    def build(self, x_shape, padding_mask_shape=None):
        self.norm.build(x_shape)
        self.mixer.build(x_shape)

    def call(self, x, padding_mask=None):
        def mix(x):
            mask, segment_ids = _masks(padding_mask)
            return self.mixer(self.norm(x), mask=mask, segment_ids=segment_ids)

        return self._add(x, self.dropout_layer(self._remat(mix)(x)))

    def call_with_state(self, x, state: MixerState | None = None, padding_mask=None):
        """Returns the output for `x` `(b t d)` after `state`, and the state after `x`."""

        def mix(x, state):
            return self.mixer.call_with_state(self.norm(x), state, *_masks(padding_mask))

        y, state = self._remat(mix)(x, state)
        return self._add(x, self.dropout_layer(y)), state

    def _remat(self, mix):
        # Without dropout, whose random generator moves on, which is no part of a function that
        # may be computed twice.
        return keras.remat(mix) if self.remat else mix

    def step(self, x, state: MixerState, mask=None):
        """Returns the output for one token `x` `(b d)` after `state`, and the state after it.

        Where the boolean `mask` `(b)` is false, the state stays as it was.
        """
        y, state = self.mixer.step(self.norm(x), state, mask)
        return self._add(x, y), state

    def _add(self, x, y):
        return ops.cast(x, self._residual_dtype) + ops.cast(y, self._residual_dtype)

    @property
    def _residual_dtype(self):
        return float32_at_least(self.compute_dtype) if self.residual_in_fp32 else self.compute_dtype

    def compute_output_spec(self, x, padding_mask=None):
        return keras.KerasTensor(x.shape, dtype=self._residual_dtype)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "hidden_dim": self.hidden_dim,
                "residual_in_fp32": self.residual_in_fp32,
                "dropout": self.dropout,
                "remat": self.remat,
                "layer_norm_epsilon": self.layer_norm_epsilon,
                **self.mixer_arguments,
            }
        )
        return config


def _masks(padding_mask):
    """Which positions are real, and which segment each belongs to if the mask can tell."""
    if padding_mask is None:
        return None, None
    mask = ops.cast(padding_mask, "bool")
    if keras.backend.standardize_dtype(padding_mask.dtype) == "bool":
        return mask, None
    return mask, segment_ids_of(padding_mask)
