from collections.abc import Mapping
from typing import Any

import keras

from keras_mamba2.layers.attention import Attention
from keras_mamba2.layers.gated_rms_normalization import GatedRMSNormalization
from keras_mamba2.layers.mlp import MLP
from keras_mamba2.layers.projection import Projection
from keras_mamba2.layers.sublayer import Sublayer


@keras.saving.register_keras_serializable(package="keras_mamba2")
class SharedTransformer(Sublayer):
    """Attention and an MLP, one after the other, whose weights several places of a model share.

    `linear(mlp(mlp_norm(attention(norm(x)))))`, without residuals. Adapters and `linear` belong to
    one place.

    Args:
        hidden_dim: int, d, the size of outputs. Inputs have twice the size.
        attention: dict, the arguments of `keras_mamba2.layers.Attention`.
        mlp: dict, the arguments of `keras_mamba2.layers.MLP`.
        layer_norm_epsilon: float.
        shared: another `SharedTransformer`, whose weights are used. Not saved by `get_config`: who
            shares them says so. `None` for own weights.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: tensor `(b t 2d)`.
        mask: optional boolean tensor `(b t)`, as `keras_mamba2.layers.Attention` takes it.
        segment_ids: optional int tensor `(b t)`, as there.

    Reference:
        - [Glorioso et al., 2024](https://arxiv.org/abs/2411.15242)
    """

    def __init__(
        self,
        hidden_dim: int,
        attention: Mapping[str, Any],
        mlp: Mapping[str, Any],
        layer_norm_epsilon: float = 1e-5,
        shared: "SharedTransformer | None" = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.hidden_dim = hidden_dim
        self.attention_arguments = dict(attention)
        self.mlp_arguments = dict(mlp)
        self.layer_norm_epsilon = layer_norm_epsilon
        own = {"dtype": self.dtype_policy}
        epsilon = {"epsilon": layer_norm_epsilon, **own}
        self.attention: Attention = Attention(
            hidden_dim,
            **attention,
            input_dim=2 * hidden_dim,
            shared=shared and shared.attention,
            name="attention",
            **own,
        )
        self.mlp: MLP = MLP(hidden_dim, **mlp, shared=shared and shared.mlp, name="mlp", **own)
        if shared is None:
            self.norm = GatedRMSNormalization(name="norm", **epsilon)
            self.mlp_norm = GatedRMSNormalization(name="mlp_norm", **epsilon)
        else:
            self.norm, self.mlp_norm = shared.norm, shared.mlp_norm
        self.linear = Projection(hidden_dim, use_bias=False, name="linear", **own)

    def build(self, x_shape, mask_shape=None, segment_ids_shape=None):
        sizes = {self.norm: 2 * self.hidden_dim, self.attention: 2 * self.hidden_dim}
        layers = self.norm, self.attention, self.mlp_norm, self.mlp, self.linear
        for layer in layers:
            if not layer.built:  # built: that of another place
                layer.build((None, None, sizes.get(layer, self.hidden_dim)))

    def call(self, x, mask=None, segment_ids=None):
        return self._finish(self.attention(self.norm(x), mask=mask, segment_ids=segment_ids))

    def call_with_state(self, x, state=None, mask=None, segment_ids=None):
        y, state = self.attention.call_with_state(self.norm(x), state, mask, segment_ids)
        return self._finish(y), state

    def step(self, x, state, mask=None):
        y, state = self.attention.step(self.norm(x), state, mask)
        return self._finish(y), state

    def extend(self, x, state, chunk, start):
        y, chunk = self.attention.extend(self.norm(x), state, chunk, start)
        return self._finish(y), chunk

    def commit(self, state, chunk, count):
        return self.attention.commit(state, chunk, count)

    def chunk_spec(self, size: int):
        return self.attention.chunk_spec(size)

    def _finish(self, y):
        return self.linear(self.mlp(self.mlp_norm(y)))

    def state_spec(self, max_length: int | None = None):
        return self.attention.state_spec(max_length)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (*self.attention.projections, *self.mlp.projections, self.linear)

    @property
    def weight_axes(self) -> Mapping[str, Mapping[str, int]]:
        parts = {"attention": self.attention, "mlp": self.mlp}
        return {
            f"{name}/{path}": axes
            for name, part in parts.items()
            for path, axes in part.weight_axes.items()
        }

    def compute_output_shape(self, x_shape) -> tuple[int | None, ...]:
        return (*x_shape[:-1], self.hidden_dim)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "hidden_dim": self.hidden_dim,
                "attention": self.attention_arguments,
                "mlp": self.mlp_arguments,
                "layer_norm_epsilon": self.layer_norm_epsilon,
            }
        )
        return config
