from typing import ClassVar
from typing import NamedTuple

import keras
import keras_hub
from keras import ops
from keras import tree

from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import POSITIVE
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import choice
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import number
from keras_mamba2.arguments import optional
from keras_mamba2.host.room import room_for
from keras_mamba2.layers.adapter import Adapter
from keras_mamba2.layers.projection import Projection
from keras_mamba2.layers.sublayer import StateTensor
from keras_mamba2.layers.sublayer import Sublayer
from keras_mamba2.ops import causal_conv1d
from keras_mamba2.ops import causal_conv1d_step
from keras_mamba2.ops.attention import Past
from keras_mamba2.ops.attention import attend
from keras_mamba2.ops.attention import product
from keras_mamba2.ops.causal_conv import causal_conv1d_commit
from keras_mamba2.ops.causal_conv import causal_conv1d_extend
from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.ops.open_chunk import put_tokens
from keras_mamba2.ops.platform import on_gpu
from keras_mamba2.ops.rounding import Rounded
from keras_mamba2.ops.rounding import restored
from keras_mamba2.ops.rounding import rounded
from keras_mamba2.ops.segments import documents_of
from keras_mamba2.ops.segments import runs

KEY_VALUE_DTYPE = optional(choice("int8"))


class AttentionState(NamedTuple):
    """The keys and values of the tokens before, with room for c tokens.

    In int8 each vector has its own scale.
    """

    keys: keras.KerasTensor | Rounded  # (b g c p), compute dtype, rotated
    values: keras.KerasTensor | Rounded  # (b g c p), compute dtype
    length: keras.KerasTensor  # (b) int32, how many of the c places are filled
    conv: keras.KerasTensor | tuple = ()  # (b k-1 (h+2g)p), compute dtype; () without convolution


class AttentionChunk(NamedTuple):
    """What attention keeps of the q tokens of an open chunk."""

    keys: keras.KerasTensor | Rounded  # (b g q p), compute dtype, rotated
    values: keras.KerasTensor | Rounded  # (b g q p), compute dtype
    conv: keras.KerasTensor | tuple = ()  # (b q (h+2g)p), the convolution's inputs


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Attention(Sublayer):
    """Causal attention in which groups of query heads share keys and values.

    Its state has room for a number of tokens, c, as `initial_state` is told. Whatever generates
    makes room as it is needed. Where a state has no room left, outputs are NaN, since they would
    be wrong in silence otherwise.

    Args:
        hidden_dim: int, d, the size of outputs.
        num_query_heads: int, h.
        num_key_value_heads: int, g; divides h.
        head_dim: int, p, the size of a head.
        rotary_dim: int, how many of the first dimensions of a head are rotated by the position.
            0 for none: the layer then knows no positions, but what comes before what.
        rope_max_wavelength: float, the base of the rotation's wavelengths.
        scale: float, scores are multiplied by it. `None` for the inverse square root of p.
        key_multiplier: float, keys are multiplied by it.
        use_bias: bool, whether the projections have a bias.
        input_dim: int, the size of inputs. `None` for d.
        conv_kernel_size: int, k, queries, keys and values pass a causal convolution of so many
            taps, with a bias. 0 for none.
        adapter_rank: int, something of this rank is added to the projections of queries, keys and
            values. `None` for nothing.
        key_value_dtype: `"int8"`, in which a state keeps keys and values. What is read after a
            state, and in a sequence with one, is rounded alike; a plain call rounds nothing.
            `None` for the compute dtype.
        shared: another `Attention`, whose projections are used. Not saved by `get_config`: who
            shares them says so. `None` for own projections.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: tensor `(b t d)`, or of the size `input_dim`.
        mask: optional boolean tensor `(b t)`, true at real tokens, which are contiguous in
            each row.
        segment_ids: optional integer tensor `(b t)`. Documents do not see each other.

    Reference:
        - [Ainslie et al., 2023](https://arxiv.org/abs/2305.13245), grouped queries
        - [Su et al., 2021](https://arxiv.org/abs/2104.09864), rotary positions
    """

    layouts: ClassVar = {
        "(query|key|value)/kernel": ("weights", "model"),
        "output/kernel": ("model", "weights"),
    }
    kept_dtypes = ("key_value_dtype",)

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
        input_dim: int | None = None,
        conv_kernel_size: int = 0,
        adapter_rank: int | None = None,
        key_value_dtype: str | None = None,
        shared: "Attention | None" = None,
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
        self.input_dim = hidden_dim if input_dim is None else input_dim
        self.conv_kernel_size = conv_kernel_size
        self.adapter_rank = adapter_rank
        self.key_value_dtype = key_value_dtype
        self._check_config()
        self.query_dim = num_query_heads * head_dim
        self.key_dim = num_key_value_heads * head_dim
        self.conv_dim = self.query_dim + 2 * self.key_dim

        def projection(name, units):
            if shared is not None:
                return shared.named_projections[name]
            return Projection(units, use_bias=use_bias, dtype=self.dtype_policy, name=name)

        self.query = projection("query", self.query_dim)
        self.key = projection("key", self.key_dim)
        self.value = projection("value", self.key_dim)
        self.output_projection = projection("output", hidden_dim)
        self.adapters = []
        if adapter_rank is not None:
            self.adapters = [
                Adapter(units, adapter_rank, dtype=self.dtype_policy, name=f"{name}_adapter")
                for name, units in zip(
                    ("query", "key", "value"),
                    (self.query_dim, self.key_dim, self.key_dim),
                    strict=True,
                )
            ]
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
            input_dim=SIZE,
            conv_kernel_size=integer(at_least=0),
            adapter_rank=optional(SIZE),
            key_value_dtype=KEY_VALUE_DTYPE,
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
        if x_shape[-1] != self.input_dim:
            raise ValueError(
                f"The input's last axis must be {self.input_dim}. Received: shape={tuple(x_shape)}"
            )
        for layer in (self.query, self.key, self.value, *self.adapters):
            if not layer.built:  # as those are that another layer shares
                layer.build((None, self.input_dim))
        if not self.output_projection.built:
            self.output_projection.build((None, self.query_dim))
        self.conv_kernel = self.conv_bias = None
        if self.conv_kernel_size:
            bound = self.conv_kernel_size**-0.5
            initializer = keras.initializers.RandomUniform(-bound, bound)
            shape = (self.conv_kernel_size, self.conv_dim)
            self.conv_kernel = self.add_weight(
                name="conv_kernel", shape=shape, initializer=initializer
            )
            self.conv_bias = self.add_weight(
                name="conv_bias", shape=shape[1:], initializer=initializer
            )

    def call(self, x, mask=None, segment_ids=None):
        t = ops.shape(x)[1]
        segment_ids = None if segment_ids is None else runs(segment_ids)
        qkv, _ = self._project(x, None, mask, segment_ids)
        q, k, v = self._heads(qkv, documents_of(x, mask, segment_ids).positions)  # (b t . p)
        if keras.config.backend() != "jax":
            repeats = self.num_query_heads // self.num_key_value_heads
            k, v = (ops.repeat(a, repeats, axis=2) for a in (k, v))
        options = {"scale": self._scale}
        if keras.config.backend() == "jax" and not on_gpu():
            # In an eager call on a TPU, Keras 3.15 scales twice, and takes the first row's mask.
            options["flash_attention"] = False
            if keras.backend.standardize_dtype(q.dtype) == "float16":
                # JAX asks for products with sums in float32, which only a GPU has for it.
                q, k, v = (ops.cast(a, "float32") for a in (q, k, v))
        if mask is None and segment_ids is None:
            y = ops.dot_product_attention(q, k, v, is_causal=True, **options)
        else:
            # A pad sees itself, or its softmax would have nothing to sum.
            seen = _sees(mask, segment_ids, t) | ops.eye(t, dtype="bool")
            y = ops.dot_product_attention(q, k, v, mask=seen[:, None], **options)
        return self.output_projection(self._joined(ops.cast(y, self.compute_dtype)))

    def call_with_state(self, x, state: AttentionState | None = None, mask=None, segment_ids=None):
        b, t = ops.shape(x)[:2]
        segment_ids = None if segment_ids is None else runs(segment_ids)
        is_first = state is None
        if state is None:  # with room for what comes next: that of one token more, or of many
            state = self.initial_state(b, room_for(t + 1))
        documents = documents_of(x, mask, segment_ids, state.length)
        qkv, conv_state = self._project(x, state.conv, mask, segment_ids)
        q, k, v = self._heads(qkv, documents.positions)
        q = ops.reshape(q, (b, t, self.num_key_value_heads, -1, self.head_dim))
        k, v = self._stored(k), self._stored(v)
        seen = _sees(mask, segment_ids, t) | ops.eye(t, dtype="bool")
        past = Past(state.keys, state.values, state.length, documents.continues)
        past = None if is_first else past
        y = attend(q, k, v, seen, self._scale, past, is_causal=True)
        keys, values = _append(state.keys, k, documents), _append(state.values, v, documents)
        state = AttentionState(keys, values, documents.after + documents.new, conv_state)
        return self.output_projection(_nan_without_room(self._joined(y), state)), state

    def step(self, x, state: AttentionState, mask=None):
        b = ops.shape(x)[0]
        going = ops.ones((b,), "bool") if mask is None else ops.cast(mask, "bool")
        qkv, conv_state = self._project_one(x, state.conv, going)
        qkv = [part[:, None] for part in qkv]
        q, k, v = self._heads(qkv, state.length[:, None])
        q = ops.reshape(q, (b, self.num_key_value_heads, -1, self.head_dim))  # (b g r p)
        count = ops.cast(going, "int32")
        keys = _put(state.keys, self._stored(k), state.length, count)
        values = _put(state.values, self._stored(v), state.length, count)
        filled = ops.arange(_places(keys)) <= state.length[:, None]
        dtype = float32_at_least(self.compute_dtype)
        scores = product(q, ops.transpose(self._read(keys), (0, 1, 3, 2)), dtype)  # (b g r c)
        weights = self._softmax(scores, filled[:, None, None])
        y = ops.cast(product(weights, self._read(values), dtype), self.compute_dtype)
        y = ops.reshape(y, (b, -1))
        state = AttentionState(keys, values, state.length + count, conv_state)
        return self.output_projection(_nan_without_room(y, state)), state

    def extend(self, x, state: AttentionState, chunk: AttentionChunk, start):
        b, t = ops.shape(x)[:2]
        qkv, inputs = self._projected(x), ()
        if self.conv_kernel_size:
            inputs = put_tokens(chunk.conv, ops.concatenate(qkv, axis=-1), start)
            taps = self.conv_kernel, self.conv_bias
            y = causal_conv1d_extend(inputs, t, *taps, conv_state=state.conv, start=start)
            qkv = self._split(y)
        place = start + ops.arange(t, dtype="int32")
        q, k, v = self._heads(qkv, state.length[:, None] + place)
        q = ops.reshape(q, (b, t, self.num_key_value_heads, -1, self.head_dim))
        keys = _put_in_chunk(chunk.keys, self._stored(k), start)
        values = _put_in_chunk(chunk.values, self._stored(v), start)
        seen = place[:, None] >= ops.arange(_places(keys))  # (t q)
        past = Past(state.keys, state.values, state.length, ops.ones((b, t), "bool"))
        y = attend(q, keys, values, seen[None], self._scale, past)
        y = _nan_without_room(self._joined(y), state)
        return self.output_projection(y), AttentionChunk(keys, values, inputs)

    def commit(self, state: AttentionState, chunk: AttentionChunk, count) -> AttentionState:
        conv = ()
        if self.conv_kernel_size:
            conv = causal_conv1d_commit(chunk.conv, conv_state=state.conv, count=count)
        return AttentionState(
            _put(state.keys, chunk.keys, state.length, count),
            _put(state.values, chunk.values, state.length, count),
            state.length + count,
            conv,
        )

    def chunk_spec(self, size: int) -> AttentionChunk:
        keys = self._stored_spec(size)
        conv = StateTensor((size, self.conv_dim), self.compute_dtype)
        return AttentionChunk(keys, keys, conv if self.conv_kernel_size else ())

    def state_spec(self, max_length: int | None = None) -> AttentionState:
        tensor = self._stored_spec(max_length)
        conv = ()
        if self.conv_kernel_size:
            conv = StateTensor((self.conv_kernel_size - 1, self.conv_dim), self.compute_dtype)
        return AttentionState(tensor, tensor, StateTensor((), "int32"), conv)

    @property
    def named_projections(self) -> dict[str, Projection]:
        """The projections but those of adapters, by their names."""
        layers = self.query, self.key, self.value, self.output_projection
        return {layer.name: layer for layer in layers}

    @property
    def projections(self) -> tuple[Projection, ...]:
        adapters = [layer for adapter in self.adapters for layer in adapter.projections]
        return (*self.named_projections.values(), *adapters)

    @property
    def weight_axes(self) -> dict[str, dict[str, int]]:
        inputs = {"input_dim": self.input_dim}
        queries = {"num_query_heads * head_dim": self.query_dim}
        keys = {"num_key_value_heads * head_dim": self.key_dim}
        return {
            "query/kernel": {**inputs, **queries},
            "key/kernel": {**inputs, **keys},
            "value/kernel": {**inputs, **keys},
            "output/kernel": {**queries, "hidden_dim": self.hidden_dim},
        }

    @property
    def _scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def _project(self, x, conv_state, mask, segment_ids):
        """Queries, keys and values, `(b t .)`, and the state of the convolution."""
        qkv = self._projected(x)
        if not self.conv_kernel_size:
            return qkv, ()
        y, conv_state = causal_conv1d(
            ops.concatenate(qkv, axis=-1),
            self.conv_kernel,
            self.conv_bias,
            conv_state=conv_state,
            mask=mask,
            segment_ids=segment_ids,
        )
        return self._split(y), conv_state

    def _project_one(self, x, conv_state, going):
        """As `_project`, for one token `(b d)`."""
        qkv = self._projected(x)
        if not self.conv_kernel_size:
            return qkv, ()
        y, new = causal_conv1d_step(
            ops.concatenate(qkv, axis=-1), self.conv_kernel, self.conv_bias, conv_state=conv_state
        )
        return self._split(y), ops.where(going[:, None, None], new, conv_state)

    def _projected(self, x):
        qkv = [layer(x) for layer in (self.query, self.key, self.value)]
        if self.adapters:
            qkv = [y + adapter(x) for y, adapter in zip(qkv, self.adapters, strict=True)]
        return [ops.cast(y, self.compute_dtype) for y in qkv]  # policies may differ

    def _split(self, qkv):
        return ops.split(qkv, [self.query_dim, self.query_dim + self.key_dim], axis=-1)

    def _heads(self, qkv, positions):
        """Queries `(b t h p)`, keys and values `(b t g p)`, rotated."""
        b, t = ops.shape(qkv[0])[:2]
        q, k, v = (ops.reshape(part, (b, t, -1, self.head_dim)) for part in qkv)
        k = k if self.key_multiplier == 1 else k * self.key_multiplier
        return self._rotate(q, positions), self._rotate(k, positions), v

    def _rotate(self, x, positions):
        if not self.rotary_dim:
            return x
        rotated = self.rotary(x[..., : self.rotary_dim], positions=positions)
        rotated = ops.cast(rotated, x.dtype)
        return ops.concatenate([rotated, x[..., self.rotary_dim :]], axis=-1)

    def _stored_spec(self, places: int | None):
        """What keys, or values, are kept as."""
        shape = (self.num_key_value_heads, places, self.head_dim)
        if self.key_value_dtype is None:
            return StateTensor(shape, self.compute_dtype, room_axis=1)
        scale = StateTensor((*shape[:-1], 1), "float32", room_axis=1)
        return Rounded(StateTensor(shape, "int8", room_axis=1), scale)

    def _stored(self, x):
        """Keys or values `(b t g p)` as a state keeps them, `(b g t p)`."""
        x = ops.transpose(x, (0, 2, 1, 3))
        if self.key_value_dtype is None:
            return ops.cast(x, self.compute_dtype)  # a projection may have a policy of its own
        return rounded(ops.cast(x, "float32"), axis=-1)

    def _read(self, stored):
        if self.key_value_dtype is None:
            return stored
        return ops.cast(restored(stored, "float32"), self.compute_dtype)

    def _softmax(self, scores, seen):
        weights = ops.softmax(ops.where(seen, scores * self._scale, -1e30), axis=-1)
        return ops.cast(weights, self.compute_dtype)

    def _joined(self, y):
        """The heads side by side."""
        return ops.reshape(y, (*ops.shape(y)[:2], self.query_dim))

    def compute_output_shape(self, x_shape) -> tuple[int | None, ...]:
        return (*x_shape[:-1], self.hidden_dim)

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
                "input_dim": self.input_dim,
                "conv_kernel_size": self.conv_kernel_size,
                "adapter_rank": self.adapter_rank,
                "key_value_dtype": self.key_value_dtype,
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


# What follows takes keys or values as they are stored: a tensor, or the tensors of `Rounded`.


def _places(stored) -> int:
    return tree.flatten(stored)[0].shape[2]


def _put(cache, new, length, count):
    """`cache` `(b g c .)` with the first `count` `(b)` of `new` `(b g t .)` after `length` `(b)`.

    Without room for them it is wrong, and later outputs are NaN.
    """
    b, g, t = tree.flatten(new)[0].shape[:3]
    index, room = ops.arange(t, dtype="int32"), _places(cache)
    is_new = (index < count[:, None]) & (length[:, None] + index < room)  # (b t)
    # The others write once more what stands at the first place, so that one scatter does it all.
    place = ops.minimum(length[:, None] + ops.where(is_new, index, 0), room - 1)
    axes = ops.arange(b)[:, None, None], ops.arange(g)[:, None], place[:, None]
    indices = ops.stack([ops.broadcast_to(ops.cast(a, "int32"), (b, g, t)) for a in axes], axis=-1)
    indices = ops.reshape(indices, (-1, 3))

    def put(cache, new):
        old = ops.take_along_axis(cache, place[:, None, :1, None], axis=2)  # (b g 1 .)
        first = ops.where(is_new[:, None, :1, None], new[:, :, :1], old)
        new = ops.where(is_new[:, None, :, None], new, first)
        return ops.scatter_update(cache, indices, ops.reshape(new, (b * g * t, -1)))

    return tree.map_structure(put, cache, new)


def _put_in_chunk(chunk, new, start):
    return tree.map_structure(lambda old, new: put_tokens(old, new, start, axis=2), chunk, new)


def _append(cache, new, documents):
    """`cache` `(b g c .)` with what belongs to a row's last document of `new` `(b g t .)`."""
    place = ops.arange(_places(cache)) - documents.after[:, None]  # (b c), among the new tokens
    source = ops.clip(documents.first[:, None] + place, 0, _places(new) - 1)
    is_new = (place >= 0) & (place < documents.new[:, None])

    def append(cache, new):
        moved = ops.take_along_axis(new, source[:, None, :, None], axis=2)
        return ops.where(is_new[:, None, :, None], moved, cache)

    return tree.map_structure(append, cache, new)


def _nan_without_room(y, state: AttentionState):
    fits = state.length <= _places(state.keys)
    fits = ops.reshape(fits, (-1, *[1] * (len(y.shape) - 1)))
    return ops.where(fits, y, ops.cast(float("nan"), y.dtype))
