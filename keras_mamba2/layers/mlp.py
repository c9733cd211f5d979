from typing import ClassVar

import keras
from keras import ops

from keras_mamba2.layers.projection import Projection
from keras_mamba2.layers.sublayer import Sublayer


def squared_relu(x):
    return ops.square(ops.relu(x))


ACTIVATIONS = {"silu": ops.silu, "squared_relu": squared_relu}


def activation_named(name: str):
    """The function of an activation.

    Raises:
        ValueError: for another name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {tuple(ACTIVATIONS)}. Received: {name!r}")
    return ACTIVATIONS[name]


class Stateless(Sublayer):
    """A sublayer that computes each position alone. A subclass defines `call`."""

    def call_with_state(self, x, state=(), mask=None, segment_ids=None):
        return self(x), ()

    def step(self, x, state=(), mask=None):
        return self(x), ()

    def compute_output_spec(self, x, mask=None, segment_ids=None):
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_mamba2")
class MLP(Stateless):
    """`down(activation(up(x)))`, or gated, `down(activation(gate(x)) * up(x))`.

    Args:
        hidden_dim: int, d, the size of inputs and outputs.
        intermediate_dim: int, f.
        activation: `"silu"` or `"squared_relu"`.
        gated: bool.
        gate_multiplier: float, the gate's projection is multiplied by it.
        use_bias: bool, whether the projections have a bias.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: tensor `(... d)`.
        mask: not needed.
        segment_ids: not needed.

    Reference:
        - [Shazeer, 2020](https://arxiv.org/abs/2002.05202), gated
        - [So et al., 2021](https://arxiv.org/abs/2109.08668), squared ReLU
    """

    layouts: ClassVar = {
        "(gate|up)/kernel": ("weights", "model"),
        "down/kernel": ("model", "weights"),
    }

    def __init__(
        self,
        hidden_dim: int,
        intermediate_dim: int,
        activation: str = "silu",
        gated: bool = True,
        gate_multiplier: float = 1.0,
        use_bias: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        for name, value in (("hidden_dim", hidden_dim), ("intermediate_dim", intermediate_dim)):
            if value < 1:
                raise ValueError(f"`{name}` must be positive. Received: {value}")
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.activation = activation
        self.gated = gated
        self.gate_multiplier = gate_multiplier
        self.use_bias = use_bias
        self._activation = activation_named(activation)

        def projection(name, units):
            return Projection(units, use_bias=use_bias, dtype=self.dtype_policy, name=name)

        self.gate = projection("gate", intermediate_dim) if gated else None
        self.up = projection("up", intermediate_dim)
        self.down = projection("down", hidden_dim)

    def build(self, x_shape, mask_shape=None, segment_ids_shape=None):
        *inward, _ = self.projections
        for layer in inward:
            layer.build((None, self.hidden_dim))
        self.down.build((None, self.intermediate_dim))

    def call(self, x, mask=None, segment_ids=None):
        up = self.up(x)
        if self.gate is None:
            return self.down(self._activation(up))
        gate = self.gate(x)
        gate = gate if self.gate_multiplier == 1 else gate * self.gate_multiplier
        return self.down(self._activation(gate) * up)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(layer for layer in (self.gate, self.up, self.down) if layer is not None)

    @property
    def weight_axes(self) -> dict[str, dict[str, int]]:
        inside = {"hidden_dim": self.hidden_dim, "intermediate_dim": self.intermediate_dim}
        axes = {"gate/kernel": inside} if self.gated else {}
        return {**axes, "up/kernel": inside, "down/kernel": dict(reversed(inside.items()))}

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "hidden_dim": self.hidden_dim,
                "intermediate_dim": self.intermediate_dim,
                "activation": self.activation,
                "gated": self.gated,
                "gate_multiplier": self.gate_multiplier,
                "use_bias": self.use_bias,
            }
        )
        return config
