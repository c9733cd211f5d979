from typing import ClassVar
from typing import NamedTuple

import keras
import keras_hub
from keras import ops

from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import POSITIVE
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import number
from keras_mamba2.arguments import optional
from keras_mamba2.layers.projection import Projection
from keras_mamba2.layers.sublayer import StateTensor
from keras_mamba2.layers.sublayer import Sublayer
from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.ops.segments import documents_of


class AttentionState(NamedTuple):
    """The keys and values of the tokens before, with room for c tokens."""

    keys: keras.KerasTensor  # (b g c p), compute dtype, rotated
    values: keras.KerasTensor  # (b g c p), compute dtype
    length: keras.KerasTensor  # (b) int32, how many of the c places are filled


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Attention(Sublayer):
    """Causal attention in which groups of query heads share keys and values.

    Its state has room for a number of tokens, c. `keras_mamba2.Mamba2CausalLM` makes room as it is
    needed. Where a state has no room left, outputs are NaN, since they would be wrong in silence
    otherwise.

    Args:
        hidden_dim: int, d, the size of inputs and outputs.
        num_query_heads: int, h.
        num_key_value_heads: int, g; divides h.
        head_dim: int, p, the size of a head.
        rotary_dim: int, how many of the first dimensions of a head are rotated by the position.
            0 for none: the layer then knows no positions, but what comes before what.
        rope_max_wavelength: float, the base of the rotation's wavelengths.
        scale: float, scores are multiplied by it. `None` for the inverse square root of p.
        key_multiplier: float, keys are multiplied by it.
        use_bias: bool, whether the projections have a bias.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: tensor `(b t d)`.
        mask: optional boolean tensor `(b t)`, true at real tokens, which are contiguous in
            each row.
        segment_ids: optional integer tensor `(b t)`. Documents do not see each other.

    Reference:
        - [Ainslie et al., 2023](https://arxiv.org/abs/2305.13245), grouped queries
        - [Su et al., 2021](https://arxiv.org/abs/2104.09864), rotary positions
    """

    layouts: ClassVar = {
        "(query|key|value)/kernel": ("weights", "model"),
        "attention/output/kernel": ("model", "weights"),
    }

    def __init__(
        self,
        hidden_dim: int,
        num_query_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        rotary_dim: int = 0,
        rope_max_wavelength: float = 10_000,
        scale: float | None = None,
        key_multiplier: float = 1.0,
        use_bias: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.hidden_dim = hidden_dim
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim
        self.rope_max_wavelength = rope_max_wavelength
        self.scale = scale
        self.key_multiplier = key_multiplier
        self.use_bias = use_bias
        self._check_config()

        def projection(name, units):
            return Projection(units, use_bias=use_bias, dtype=self.dtype_policy, name=name)

        self.query = projection("query", num_query_heads * head_dim)
        self.key = projection("key", num_key_value_heads * head_dim)
        self.value = projection("value", num_key_value_heads * head_dim)
        self.output_projection = projection("output", hidden_dim)
        # In float32: a position in bfloat16 would be one of its neighbours.
        self.rotary = keras_hub.layers.RotaryEmbedding(
            max_wavelength=rope_max_wavelength,
            dtype=float32_at_least(self.compute_dtype),
            name="rotary",
        )

    def _check_config(self):
        check_attributes(
            self,
            hidden_dim=SIZE,
            num_query_heads=SIZE,
            num_key_value_heads=SIZE,
            head_dim=SIZE,
            rotary_dim=integer(at_least=0),
            rope_max_wavelength=POSITIVE,
            scale=optional(number()),
            key_multiplier=number(),
            use_bias=BOOLEAN,
        )
        if self.num_query_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_key_value_heads` must divide `num_query_heads`. Received: "
                f"num_query_heads={self.num_query_heads}, "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.rotary_dim > self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                "`rotary_dim` must be even, and at most `head_dim`. Received: "
                f"rotary_dim={self.rotary_dim}, head_dim={self.head_dim}"
            )

    def build(self, x_shape, mask_shape=None, segment_ids_shape=None):
        if x_shape[-1] != self.hidden_dim:
            raise ValueError(
                f"The input's last axis must be hidden_dim={self.hidden_dim}. "
                f"Received: shape={tuple(x_shape)}"
            )
        for layer in (self.query, self.key, self.value):
            layer.build((None, self.hidden_dim))
        self.output_projection.build((None, self.num_query_heads * self.head_dim))

    def call(self, x, mask=None, segment_ids=None):
        t = ops.shape(x)[1]
        q, k, v = self._project(x, documents_of(x, mask, segment_ids).positions)  # (b t . p)
        if keras.config.backend() != "jax":
            repeats = self.num_query_heads // self.num_key_value_heads
            k, v = (ops.repeat(a, repeats, axis=2) for a in (k, v))
        if mask is None and segment_ids is None:
            y = ops.dot_product_attention(q, k, v, scale=self._scale, is_causal=True)
        else:
            # A pad sees itself, or its softmax would have nothing to sum.
            seen = _sees(mask, segment_ids, t) | ops.eye(t, dtype="bool")
            y = ops.dot_product_attention(q, k, v, mask=seen[:, None], scale=self._scale)
        return self.output_projection(self._joined(y))

    def call_with_state(self, x, state: AttentionState | None = None, mask=None, segment_ids=None):
        b, t = ops.shape(x)[:2]
        state = self.initial_state(b, t) if state is None else state
        documents = documents_of(x, mask, segment_ids, state.length)
        q, k, v = self._project(x, documents.positions)
        q = ops.reshape(q, (b, t, self.num_key_value_heads, -1, self.head_dim))
        k, v = ops.transpose(k, (0, 2, 1, 3)), ops.transpose(v, (0, 2, 1, 3))  # (b g t p)
        filled = ops.arange(state.keys.shape[2]) < state.length[:, None]  # (b c)
        before = filled[:, None] & documents.continues[..., None]  # (b t c)
        seen = ops.broadcast_to(_sees(mask, segment_ids, t) | ops.eye(t, dtype="bool"), (b, t, t))
        scores = [ops.einsum("btgrp,bgcp->bgrtc", q, keys) for keys in (state.keys, k)]
        c = state.keys.shape[2]
        weights = self._softmax(
            ops.concatenate(scores, axis=-1),
            ops.concatenate([before, seen], axis=-1)[:, None, None],
        )
        y = ops.einsum("bgrtc,bgcp->btgrp", weights[..., :c], state.values)
        y = y + ops.einsum("bgrtc,bgcp->btgrp", weights[..., c:], v)
        keys, values = _append(state.keys, k, documents), _append(state.values, v, documents)
        state = AttentionState(keys, values, documents.after + documents.new)
        return self.output_projection(_nan_without_room(self._joined(y), state)), state

    def step(self, x, state: AttentionState, mask=None):
        b = ops.shape(x)[0]
        q, k, v = self._project(x[:, None], state.length[:, None])
        q = ops.reshape(q, (b, self.num_key_value_heads, -1, self.head_dim))  # (b g r p)
        # A row that does not go on writes where nothing counts: behind what is filled.
        keys, values = (
            _put(state.keys, k[:, 0], state.length),
            _put(state.values, v[:, 0], state.length),
        )
        filled = ops.arange(state.keys.shape[2]) <= state.length[:, None]
        scores = ops.einsum("bgrp,bgcp->bgrc", q, keys)
        weights = self._softmax(scores, filled[:, None, None])
        y = ops.reshape(ops.einsum("bgrc,bgcp->bgrp", weights, values), (b, -1))
        length = state.length + (1 if mask is None else ops.cast(mask, "int32"))
        state = AttentionState(keys, values, length)
        return self.output_projection(_nan_without_room(y, state)), state

    def state_spec(self, max_length: int | None = None) -> AttentionState:
        shape = (self.num_key_value_heads, max_length, self.head_dim)
        tensor = StateTensor(shape, self.compute_dtype, room_axis=1)
        return AttentionState(tensor, tensor, StateTensor((), "int32"))

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.query, self.key, self.value, self.output_projection

    @property
    def weight_axes(self) -> dict[str, dict[str, int]]:
        queries = self.num_query_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return {
            "query/kernel": {"hidden_dim": self.hidden_dim, "num_query_heads * head_dim": queries},
            "key/kernel": {"hidden_dim": self.hidden_dim, "num_key_value_heads * head_dim": keys},
            "value/kernel": {"hidden_dim": self.hidden_dim, "num_key_value_heads * head_dim": keys},
            "output/kernel": {"num_query_heads * head_dim": queries, "hidden_dim": self.hidden_dim},
        }

    @property
    def _scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def _project(self, x, positions):
        """Queries `(b t h p)`, keys and values `(b t g p)` for `x` `(b t d)`."""
        b, t = ops.shape(x)[:2]
        q, k, v = (
            ops.reshape(layer(x), (b, t, -1, self.head_dim))
            for layer in (self.query, self.key, self.value)
        )
        k = k if self.key_multiplier == 1 else k * self.key_multiplier
        return self._rotate(q, positions), self._rotate(k, positions), v

    def _rotate(self, x, positions):
        if not self.rotary_dim:
            return x
        rotated = self.rotary(x[..., : self.rotary_dim], positions=positions)
        rotated = ops.cast(rotated, x.dtype)
        return ops.concatenate([rotated, x[..., self.rotary_dim :]], axis=-1)

    def _softmax(self, scores, seen):
        scores = ops.cast(scores, float32_at_least(self.compute_dtype)) * self._scale
        weights = ops.softmax(ops.where(seen, scores, -1e30), axis=-1)
        return ops.cast(weights, self.compute_dtype)

    def _joined(self, y):
        """The heads side by side."""
        return ops.reshape(y, (*ops.shape(y)[:2], self.num_query_heads * self.head_dim))

    def compute_output_spec(self, x, mask=None, segment_ids=None):
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "hidden_dim": self.hidden_dim,
                "num_query_heads": self.num_query_heads,
                "num_key_value_heads": self.num_key_value_heads,
                "head_dim": self.head_dim,
                "rotary_dim": self.rotary_dim,
                "rope_max_wavelength": self.rope_max_wavelength,
                "scale": self.scale,
                "key_multiplier": self.key_multiplier,
                "use_bias": self.use_bias,
            }
        )
        return config


def _sees(mask, segment_ids, t: int):
    """Which of a sequence's positions each one sees, `(b t t)` or `(1 t t)`."""
    index = ops.arange(t)
    seen = (index[:, None] >= index)[None]
    if mask is not None:
        seen = seen & mask[:, None, :]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return seen


def _put(cache, new, length):
    """`cache` `(b g c p)` with `new` `(b g p)` at place `length` `(b)` of each row."""
    b, g = cache.shape[:2]
    b = ops.shape(new)[0] if b is None else b
    rows = ops.broadcast_to(ops.arange(b, dtype="int32")[:, None], (b, g))
    heads = ops.broadcast_to(ops.arange(g, dtype="int32")[None], (b, g))
    places = ops.broadcast_to(ops.minimum(length, cache.shape[2] - 1)[:, None], (b, g))
    indices = ops.reshape(ops.stack([rows, heads, places], axis=-1), (-1, 3))
    return ops.scatter_update(cache, indices, ops.reshape(new, (-1, cache.shape[3])))


def _append(cache, new, documents):
    """`cache` `(b g c p)` with what belongs to a row's last document of `new` `(b g t p)`."""
    place = ops.arange(cache.shape[2]) - documents.after[:, None]  # (b c), among the new tokens
    source = ops.clip(documents.first[:, None] + place, 0, new.shape[2] - 1)
    moved = ops.take_along_axis(new, source[:, None, :, None], axis=2)
    is_new = (place >= 0) & (place < documents.new[:, None])
    return ops.where(is_new[:, None, :, None], moved, cache)


def _nan_without_room(y, state: AttentionState):
    fits = state.length <= state.keys.shape[2]
    fits = ops.reshape(fits, (-1, *[1] * (len(y.shape) - 1)))
    return ops.where(fits, y, ops.cast(float("nan"), y.dtype))
