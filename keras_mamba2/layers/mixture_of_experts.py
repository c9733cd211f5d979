from typing import Any
from typing import ClassVar

import keras
from keras import ops

from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import choice
from keras_mamba2.arguments import number
from keras_mamba2.arguments import optional
from keras_mamba2.layers.experts_projection import AnyProjection
from keras_mamba2.layers.experts_projection import ExpertsProjection
from keras_mamba2.layers.mlp import Stateless
from keras_mamba2.layers.mlp import activation_named
from keras_mamba2.layers.projection import Projection
from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.ops.experts import grouped_matmul
from keras_mamba2.ops.matrix import unrounded_matmul

SCORINGS = ("softmax", "sigmoid")


@keras.saving.register_keras_serializable(package="keras_mamba2")
class MixtureOfExperts(Stateless):
    """MLPs of which each token takes those that a router chooses.

    The router computes in float32. With `scoring="softmax"` it takes the k largest logits, and
    the softmax of these are the weights of the experts. With `"sigmoid"` it chooses by the sigmoid
    plus a bias that only balances the choice, within the best groups of experts, and the weights
    are the sigmoids themselves.

    Args:
        hidden_dim: int, d, the size of inputs and outputs.
        intermediate_dim: int, f, the inner size of an expert.
        num_experts: int, e.
        num_experts_per_token: int, k.
        activation: as in `keras_mamba2.layers.MLP`.
        gated: bool, as there.
        scoring: `"softmax"` or `"sigmoid"`.
        num_expert_groups: int, experts form so many groups, with at least two in each. Only with
            `"sigmoid"`, as what follows.
        num_groups_per_token: int, of how many groups a token takes experts. A group counts by its
            two best.
        normalize_weights: bool, whether a token's weights are divided by their sum.
        weights_multiplier: float, the weights are multiplied by it.
        latent_dim: int, experts compute on a projection of this size. `None` for none.
        use_bias: bool, whether the projections to and from it have a bias.
        load_balancing_loss: float. In training so many times the load-balancing loss of Switch
            Transformers, `e * sum(share of tokens * mean probability)` over experts, is added, so
            that all experts are used. Not with `remat`.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: tensor `(... d)`.
        mask: optional boolean tensor `(...)`. Only real tokens count in the load-balancing loss.
        segment_ids: not needed.

    Reference:
        - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), load balancing
        - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538)
        - [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), sigmoid, groups, balancing bias
    """

    layouts: ClassVar = {
        "experts_(gate|up)/kernel": ("model", "weights", None),
        "experts_down/kernel": ("model", None, "weights"),
        "experts_(gate|up|down)/(kernel_scale|kernel_zero|lora_kernel_[ab])": ("model", None, None),
    }

    def __init__(
        self,
        hidden_dim: int,
        intermediate_dim: int,
        num_experts: int,
        num_experts_per_token: int,
        activation: str = "silu",
        gated: bool = True,
        scoring: str = "softmax",
        num_expert_groups: int = 1,
        num_groups_per_token: int = 1,
        normalize_weights: bool = True,
        weights_multiplier: float = 1.0,
        latent_dim: int | None = None,
        use_bias: bool = False,
        load_balancing_loss: float = 0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.load_balancing_loss = load_balancing_loss
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.num_experts = num_experts
        self.num_experts_per_token = num_experts_per_token
        self.activation = activation
        self.gated = gated
        self.scoring = scoring
        self.num_expert_groups = num_expert_groups
        self.num_groups_per_token = num_groups_per_token
        self.normalize_weights = normalize_weights
        self.weights_multiplier = weights_multiplier
        self.latent_dim = latent_dim
        self.use_bias = use_bias
        self._activation = activation_named(activation)
        self._check_config()
        policy = self.dtype_policy

        def experts(name: str, units: int) -> ExpertsProjection:
            return ExpertsProjection(num_experts, units, name=name, dtype=policy)

        self.experts_gate = experts("experts_gate", intermediate_dim) if gated else None
        self.experts_up = experts("experts_up", intermediate_dim)
        self.experts_down = experts("experts_down", latent_dim or hidden_dim)
        self.latent_down = self.latent_up = None
        if latent_dim is not None:
            own: dict[str, Any] = {"use_bias": use_bias, "dtype": policy}
            self.latent_down = Projection(latent_dim, name="latent_down", **own)
            self.latent_up = Projection(hidden_dim, name="latent_up", **own)

    def _check_config(self):
        check_attributes(
            self,
            hidden_dim=SIZE,
            intermediate_dim=SIZE,
            num_experts=SIZE,
            num_experts_per_token=SIZE,
            gated=BOOLEAN,
            scoring=choice(*SCORINGS),
            num_expert_groups=SIZE,
            num_groups_per_token=SIZE,
            normalize_weights=BOOLEAN,
            weights_multiplier=number(),
            latent_dim=optional(SIZE),
            use_bias=BOOLEAN,
            load_balancing_loss=number(at_least=0),
        )
        e, groups = self.num_experts, self.num_expert_groups
        if groups > 1 and (e % groups or e // groups < 2 or self.scoring != "sigmoid"):
            raise ValueError(
                "Groups of experts need scoring='sigmoid', and at least two experts in each of "
                f"equal size. Received: num_experts={e}, num_expert_groups={groups}, "
                f"scoring={self.scoring!r}"
            )
        reachable = e // groups * min(self.num_groups_per_token, groups)
        if self.num_experts_per_token > reachable:
            raise ValueError(
                f"A token cannot take {self.num_experts_per_token} of {reachable} experts. "
                f"Received: num_experts_per_token={self.num_experts_per_token}, num_experts={e}, "
                f"num_expert_groups={groups}, num_groups_per_token={self.num_groups_per_token}"
            )

    def build(self, x_shape, mask_shape=None, segment_ids_shape=None):
        e, f, d = self.num_experts, self.intermediate_dim, self.latent_dim or self.hidden_dim
        # Beside a bias that balances, near ties decide: Nemotron's is float32 in every checkpoint.
        is_float32 = self.scoring == "sigmoid"
        self.router = self.add_weight(
            name="router",
            shape=(self.hidden_dim, e),
            dtype=float32_at_least(self.variable_dtype) if is_float32 else None,
            initializer="glorot_uniform",
            autocast=False,
        )
        self.router_bias = None
        if self.scoring == "sigmoid":
            # It balances the choice from outside: no gradient reaches it.
            self.router_bias = self.add_weight(
                name="router_bias",
                shape=(e,),
                dtype="float32",
                autocast=False,
                initializer="zeros",
                trainable=False,
            )

        for layer in (self.experts_gate, self.experts_up):
            if layer is not None:
                layer.build((None, d))
        self.experts_down.build((None, f))
        if self.latent_down is not None and self.latent_up is not None:
            self.latent_down.build((None, self.hidden_dim))
            self.latent_up.build((None, self.latent_dim))

    def call(self, x, mask=None, segment_ids=None, training=None):
        tokens = ops.reshape(x, (-1, self.hidden_dim))  # (n d)
        weights, experts = self.route(tokens)
        if training and self.load_balancing_loss:
            mask = None if mask is None else ops.reshape(mask, (-1,))
            self.add_loss(self.load_balancing_loss * self._imbalance(tokens, experts, mask))
        tokens = tokens if self.latent_down is None else self.latent_down(tokens)
        y = grouped_matmul(tokens, weights, experts, self.num_experts, self._experts)
        y = y if self.latent_up is None else self.latent_up(y)
        return ops.reshape(y, ops.shape(x))

    def _experts(self, x, matmul):
        """The experts, where `matmul(x, kernels)` gives each token the kernel of its expert."""
        up = self.experts_up(x, matmul=matmul)
        if self.experts_gate is None:
            up = self._activation(up)
        else:
            up = self._activation(self.experts_gate(x, matmul=matmul)) * up
        return self.experts_down(up, matmul=matmul)

    def _imbalance(self, x, experts, mask):
        """k where every expert gets as many of the tokens `(n d)`, and more where not."""
        logits = self._router_logits(x)
        if self.scoring == "softmax":
            probabilities = ops.softmax(logits, axis=-1)
        else:
            scores = ops.sigmoid(logits)
            probabilities = scores / ops.sum(scores, axis=-1, keepdims=True)
        e = self.num_experts
        counts = ops.sum(ops.one_hot(experts, e, dtype=logits.dtype), axis=1)  # (n e)
        real = (
            ops.ones_like(logits[:, :1]) if mask is None else ops.cast(mask, logits.dtype)[:, None]
        )
        total = ops.maximum(ops.sum(real), 1)
        share, mean = (ops.sum(a * real, axis=0) / total for a in (counts, probabilities))
        return e * ops.sum(share * mean)

    def _router_logits(self, x):
        dtype = float32_at_least(self.compute_dtype)
        return unrounded_matmul(ops.cast(x, dtype), ops.cast(self.router, dtype))

    def route(self, x):
        """The experts of each token `(n d)` and their weights: `(weights, experts)`, `(n k)`."""
        logits = self._router_logits(x)
        k = self.num_experts_per_token
        if self.scoring == "softmax":
            logits, experts = ops.top_k(logits, k)
            weights = ops.softmax(logits, axis=-1)
        else:
            scores = ops.sigmoid(logits)
            _, experts = ops.top_k(self._choice(scores), k)
            weights = ops.take_along_axis(scores, experts, axis=-1)
            if self.normalize_weights:
                weights = weights / (ops.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return weights * self.weights_multiplier, experts

    def _choice(self, scores):
        """By what experts are chosen: `(n e)`, minus infinity outside the best groups."""
        choice = scores + ops.cast(self.router_bias, scores.dtype)
        groups = self.num_expert_groups
        if self.num_groups_per_token >= groups:
            return choice
        choice = ops.reshape(choice, (-1, groups, self.num_experts // groups))
        best = ops.sum(ops.top_k(choice, 2)[0], axis=-1)
        _, kept = ops.top_k(best, self.num_groups_per_token)
        kept = ops.any(kept[..., None] == ops.arange(groups), axis=1)  # (n groups)
        choice = ops.where(kept[..., None], choice, -float("inf"))
        return ops.reshape(choice, (-1, self.num_experts))

    @property
    def projections(self) -> tuple[AnyProjection, ...]:
        latent = self.latent_down, self.latent_up
        layers = self.experts_gate, self.experts_up, self.experts_down, *latent
        return tuple(layer for layer in layers if layer is not None)

    @property
    def weight_axes(self) -> dict[str, dict[str, int]]:
        d = self.latent_dim or self.hidden_dim
        sizes = {"num_experts": self.num_experts, "hidden_dim": d, "f": self.intermediate_dim}
        down = {"num_experts": self.num_experts, "f": self.intermediate_dim, "hidden_dim": d}
        gate = {"experts_gate/kernel": sizes} if self.gated else {}
        return {**gate, "experts_up/kernel": sizes, "experts_down/kernel": down}

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "hidden_dim": self.hidden_dim,
                "intermediate_dim": self.intermediate_dim,
                "num_experts": self.num_experts,
                "num_experts_per_token": self.num_experts_per_token,
                "activation": self.activation,
                "gated": self.gated,
                "scoring": self.scoring,
                "num_expert_groups": self.num_expert_groups,
                "num_groups_per_token": self.num_groups_per_token,
                "normalize_weights": self.normalize_weights,
                "weights_multiplier": self.weights_multiplier,
                "latent_dim": self.latent_dim,
                "use_bias": self.use_bias,
                "load_balancing_loss": self.load_balancing_loss,
            }
        )
        return config
