import keras
from keras import ops

from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import POSITIVE
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import check_keywords
from keras_mamba2.ops.channels import scale_channels
from keras_mamba2.ops.checks import float32_at_least


@keras.saving.register_keras_serializable(package="keras_mamba2")
class GatedRMSNormalization(keras.layers.Layer):
    """Root mean square normalization of a gated input, `norm(x * silu(gate)) * scale`.

    Computed in float32 whatever the dtype policy. The input is not cast to the compute dtype
    first, so that a float32 residual stream is normalised at full precision.

    Args:
        num_groups: int, the last axis is normalised in so many equal parts, each on its own.
        epsilon: float, added to the mean square.
        norm_before_gate: bool, whether the input is normalized and then gated,
            `norm(x) * scale * silu(gate)`.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: tensor `(... e)`.
        gate: optional tensor of the shape of `x`. Without it this is plain RMS normalization.

    Reference:
        - [Dao and Gu, 2024](https://arxiv.org/abs/2405.21060), section 7.1
        - [Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467)
    """

    def __init__(
        self,
        num_groups: int = 1,
        epsilon: float = 1e-5,
        norm_before_gate: bool = False,
        **kwargs,
    ):
        check_keywords(type(self), kwargs)
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        self.num_groups = num_groups
        self.epsilon = epsilon
        self.norm_before_gate = norm_before_gate
        check_attributes(self, num_groups=SIZE, epsilon=POSITIVE, norm_before_gate=BOOLEAN)

    def build(self, x_shape, gate_shape=None):
        if x_shape[-1] % self.num_groups:
            raise ValueError(
                "`num_groups` must divide the size of the last axis. Received: "
                f"num_groups={self.num_groups}, input shape={tuple(x_shape)}"
            )
        self.scale = self.add_weight(
            name="scale", shape=(x_shape[-1],), initializer="ones", autocast=False
        )

    def call(self, x, gate=None):
        dtype = float32_at_least(self.compute_dtype)
        x = ops.cast(x, dtype)
        gate = None if gate is None else ops.silu(ops.cast(gate, dtype))
        if gate is not None and not self.norm_before_gate:
            x = x * gate
        shape = ops.shape(x)
        groups = ops.reshape(x, (*shape[:-1], self.num_groups, -1))
        mean_square = ops.mean(ops.square(groups), axis=-1, keepdims=True)
        x = ops.reshape(groups * ops.rsqrt(mean_square + self.epsilon), shape)
        x = scale_channels(x, ops.cast(self.scale, dtype))
        x = x * gate if gate is not None and self.norm_before_gate else x
        return ops.cast(x, self.compute_dtype)

    def compute_output_spec(self, x, gate=None):
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "num_groups": self.num_groups,
                "epsilon": self.epsilon,
                "norm_before_gate": self.norm_before_gate,
            }
        )
        return config
