import keras

from keras_mamba2.arguments import SIZE
from keras_mamba2.layers.projection import Projection


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Adapter(keras.layers.Layer):
    """A product of low rank, `up(down(x))`, that belongs to the model: no LoRA, which is trained.

    Args:
        units: int, the size of outputs.
        rank: int.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: tensor `(... d)`.
    """

    def __init__(self, units: int, rank: int, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.units = SIZE("units", units)
        self.rank = SIZE("rank", rank)
        self.down = Projection(rank, use_bias=False, dtype=self.dtype_policy, name="adapter_down")
        self.up = Projection(units, use_bias=False, dtype=self.dtype_policy, name="adapter_up")

    def build(self, x_shape):
        self.down.build(x_shape)
        self.up.build((None, self.rank))

    def call(self, x):
        return self.up(self.down(x))

    @property
    def projections(self) -> tuple[Projection, Projection]:
        return self.down, self.up

    def get_config(self):
        return {**super().get_config(), "units": self.units, "rank": self.rank}
