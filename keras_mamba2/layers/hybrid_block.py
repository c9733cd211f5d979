import keras

from keras_mamba2._compat.keras_layers import flatten_layers
from keras_mamba2.arguments import instance
from keras_mamba2.layers.residual_block import ResidualBlock
from keras_mamba2.layers.sublayer import Sublayer


@keras.saving.register_keras_serializable(package="keras_mamba2")
class HybridBlock(ResidualBlock):
    """A residual block round any sublayer, `x + residual_multiplier * sublayer(norm(x))`.

    Args:
        hidden_dim: int, d, the size of the residual stream.
        sublayer: `keras_mamba2.layers.Sublayer`, of the block's dtype.
        **kwargs: see `keras_mamba2.layers.ResidualBlock`.
    """

    def __init__(self, hidden_dim: int, sublayer: Sublayer, **kwargs):
        super().__init__(hidden_dim, **kwargs)
        self._sublayer = instance(Sublayer)("sublayer", sublayer)
        adds_loss = any(
            getattr(part, "load_balancing_loss", 0) for part in flatten_layers(sublayer)
        )
        if self.remat and adds_loss:
            raise ValueError(
                "With `remat` a block is computed twice, and would add its `load_balancing_loss` "
                "where it is lost. Pass `remat=False`, or `load_balancing_loss=0`."
            )

    @property
    def sublayer(self) -> Sublayer:
        return self._sublayer

    def get_config(self):
        sublayer = keras.saving.serialize_keras_object(self.sublayer)
        return {**super().get_config(), "sublayer": sublayer}

    @classmethod
    def from_config(cls, config):
        sublayer = keras.saving.deserialize_keras_object(config["sublayer"])
        return cls(**{**config, "sublayer": sublayer})
