from typing import ClassVar

import keras
from keras import ops

from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import choice
from keras_mamba2.arguments import number
from keras_mamba2.arguments import optional
from keras_mamba2.layers.adapter import Adapter
from keras_mamba2.layers.projection import Projection
from keras_mamba2.layers.sublayer import Sublayer


def squared_relu(x):
    return ops.square(ops.relu(x))


def exact_gelu(x):
    return ops.gelu(x, approximate=False)


ACTIVATIONS = {"silu": ops.silu, "squared_relu": squared_relu, "gelu": exact_gelu}


def activation_named(name: str):
    """The function of an activation.

    Raises:
        ValueError: for another name.
    """
    return ACTIVATIONS[choice(*ACTIVATIONS)("activation", name)]


class Stateless(Sublayer):
    """A sublayer that computes each position alone. A subclass defines `call`."""

    def call_with_state(self, x, state=(), mask=None, segment_ids=None):
        return self(x, mask=mask), ()

    def step(self, x, state=(), mask=None):
        return self(x), ()

    def extend(self, x, state=(), chunk=(), start=0):
        return self(x), ()

    def commit(self, state, chunk, count):
        return ()


@keras.saving.register_keras_serializable(package="keras_mamba2")
class MLP(Stateless):
    """`down(activation(up(x)))`, or gated, `down(activation(gate(x)) * up(x))`.

    Args:
        hidden_dim: int, d, the size of inputs and outputs.
        intermediate_dim: int, f.
        activation: `"silu"`, `"squared_relu"` or `"gelu"`, not approximated.
        gated: bool.
        gate_multiplier: float, the gate's projection is multiplied by it.
        use_bias: bool, whether the projections have a bias.
        adapter_rank: int, something of this rank is added to the projections `gate` and `up`.
            `None` for nothing.
        shared: another `MLP`, whose projections are used. Not saved by `get_config`: who shares
            them says so. `None` for own projections.
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
        adapter_rank: int | None = None,
        shared: "MLP | None" = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.activation = activation
        self.gated = gated
        self.gate_multiplier = gate_multiplier
        self.use_bias = use_bias
        self.adapter_rank = adapter_rank
        self._activation = activation_named(activation)
        check_attributes(
            self,
            hidden_dim=SIZE,
            intermediate_dim=SIZE,
            gated=BOOLEAN,
            gate_multiplier=number(),
            use_bias=BOOLEAN,
            adapter_rank=optional(SIZE),
        )

        def projection(name, units):
            if shared is not None:
                return shared.named_projections[name]
            return Projection(units, use_bias=use_bias, dtype=self.dtype_policy, name=name)

        self.gate = projection("gate", intermediate_dim) if gated else None
        self.up = projection("up", intermediate_dim)
        self.down = projection("down", hidden_dim)
        self.adapter = None
        if adapter_rank is not None:
            units = intermediate_dim * (2 if gated else 1)
            self.adapter = Adapter(units, adapter_rank, dtype=self.dtype_policy, name="adapter")

    def build(self, x_shape, mask_shape=None, segment_ids_shape=None):
        layers = [self.up, self.gate, self.adapter]
        for layer in layers:
            if layer is not None and not layer.built:  # built: that of another layer
                layer.build((None, self.hidden_dim))
        if not self.down.built:
            self.down.build((None, self.intermediate_dim))

    def call(self, x, mask=None, segment_ids=None):
        gate, up = self._gate_and_up(x)
        if gate is None:
            return self.down(self._activation(up))
        gate = gate if self.gate_multiplier == 1 else gate * self.gate_multiplier
        return self.down(self._activation(gate) * up)

    def _gate_and_up(self, x):
        gate, up = None if self.gate is None else self.gate(x), self.up(x)
        if self.adapter is None:
            return gate, up
        added = self.adapter(x)
        if gate is None:
            return None, up + added
        return gate + added[..., : self.intermediate_dim], up + added[..., self.intermediate_dim :]

    @property
    def named_projections(self) -> dict[str, Projection]:
        """The projections but those of adapters, by their names."""
        layers = self.gate, self.up, self.down
        return {layer.name: layer for layer in layers if layer is not None}

    @property
    def projections(self) -> tuple[Projection, ...]:
        adapter = () if self.adapter is None else self.adapter.projections
        return (*self.named_projections.values(), *adapter)

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
                "adapter_rank": self.adapter_rank,
            }
        )
        return config
