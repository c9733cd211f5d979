import keras

from keras_mamba2.layers.mamba2_mixer import Mamba2Mixer
from keras_mamba2.layers.residual_block import ResidualBlock


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2Block(ResidualBlock):
    """A residual block with a Mamba-2 mixer, `x + mixer(norm(x))`.

    Args:
        hidden_dim: int, d, the size of the residual stream.
        residual_in_fp32: bool, whether the residual stream is float32 whatever the dtype
            policy. If so, the output is float32.
        dropout: float, the rate at which the mixer's output is dropped in training.
        remat: bool, whether norm and mixer are computed again in the backward pass instead of
            being stored.
        layer_norm_epsilon: float, of both norms.
        residual_multiplier: float, what is added to the residual stream is multiplied by it.
        dtype: dtype policy.
        name: str.
        trainable: bool.
        **kwargs: the arguments of `keras_mamba2.layers.Mamba2Mixer`.

    Call arguments:
        x: tensor `(b t d)`.
        padding_mask: optional tensor `(b t)`, non-zero at real tokens.
        segment_ids: optional int tensor `(b t)`, numbers of the documents of a packed row: the
            mixer restarts where the number changes.
    """

    def __init__(
        self,
        hidden_dim: int,
        residual_in_fp32: bool = True,
        dropout: float = 0.0,
        remat: bool = False,
        layer_norm_epsilon: float = 1e-5,
        residual_multiplier: float = 1.0,
        dtype=None,
        name: str | None = None,
        trainable: bool = True,
        **kwargs,
    ):
        super().__init__(
            hidden_dim,
            residual_in_fp32=residual_in_fp32,
            dropout=dropout,
            remat=remat,
            layer_norm_epsilon=layer_norm_epsilon,
            residual_multiplier=residual_multiplier,
            dtype=dtype,
            name=name,
            trainable=trainable,
        )
        self.mixer_arguments = kwargs
        self.mixer = Mamba2Mixer(
            hidden_dim,
            layer_norm_epsilon=layer_norm_epsilon,
            dtype=self.dtype_policy,
            name="mixer",
            **kwargs,
        )

    @property
    def sublayer(self) -> Mamba2Mixer:
        return self.mixer

    def get_config(self):
        return {
            **super().get_config(),
            **{name: getattr(self.mixer, name) for name in self.mixer_arguments},
        }
