import math
from collections.abc import Sequence
from typing import Any
from typing import ClassVar
from typing import NamedTuple

import keras
import numpy as np
from keras import initializers
from keras import ops
from keras import random

from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import POSITIVE
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import Kind
from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import choice
from keras_mamba2.arguments import number
from keras_mamba2.arguments import optional
from keras_mamba2.arguments import several
from keras_mamba2.layers.distributed_ssd import distributed_ssd
from keras_mamba2.layers.gated_rms_normalization import GatedRMSNormalization
from keras_mamba2.layers.projection import Projection
from keras_mamba2.layers.sublayer import StateTensor
from keras_mamba2.layers.sublayer import Sublayer
from keras_mamba2.ops import causal_conv1d
from keras_mamba2.ops import causal_conv1d_step
from keras_mamba2.ops import ssd_step
from keras_mamba2.ops.causal_conv import causal_conv1d_commit
from keras_mamba2.ops.causal_conv import causal_conv1d_extend
from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.ops.chunk_size import default_chunk_size
from keras_mamba2.ops.open_chunk import commit_chunk
from keras_mamba2.ops.open_chunk import open_chunk_output
from keras_mamba2.ops.open_chunk import put_tokens
from keras_mamba2.ops.stochastic_rounding import stochastic_round


def _limits(limit):
    """`(low, high)` with None for infinity, which JSON has no word for."""
    two = several(Kind("a value", lambda value: value), 2)
    low, high = (0.0, None) if limit is None else two.standard(limit)
    low = float(number(at_least=0).standard(low))
    if high is None or high == math.inf:
        return low, None
    return low, float(number(above=low).standard(high))


LIMITS = Kind("two numbers in order, `(0, None)` for no limits, or None", _limits)
GATED_NORMS = ("after_gate", "before_gate", "none")
STATE_DTYPE = optional(choice("bfloat16"))


class MixerState(NamedTuple):
    """What a mixer remembers of the tokens before."""

    conv: keras.KerasTensor  # (b k-1 e+2gn), compute dtype
    ssm: keras.KerasTensor  # (b h p n), float32


class RoundedMixerState(NamedTuple):
    """The same with a `state_dtype`, whose rounding depends on how many tokens were read."""

    conv: keras.KerasTensor  # (b k-1 e+2gn), compute dtype
    ssm: keras.KerasTensor  # (b h p n), the `state_dtype`
    length: keras.KerasTensor  # (b), int32


class MixerChunk(NamedTuple):
    """What a mixer keeps of the q tokens of an open chunk."""

    conv: keras.KerasTensor  # (b q e+2gn), the convolution's inputs, compute dtype
    # Heads and groups side by side: a TPU pads the last axis to 128, and p is less.
    x: keras.KerasTensor  # (b q h*p), compute dtype
    dt: keras.KerasTensor  # (b q h), float32
    B: keras.KerasTensor  # (b q g*n), compute dtype


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2Mixer(Sublayer):
    """The Mamba-2 sequence mixer: in_proj, causal convolution, SSD, gated norm, out_proj.

    `call` maps a sequence to a sequence. `call_with_state` does the same from a state, and
    returns the state after the last real token; `step` advances it by one token. The three
    agree: see `tests/layers/test_mamba2_mixer.py`.

    The parameters of the recurrence (`A_log`, `dt_bias`, `D`) are float32 variables, and step
    sizes, decays and the SSM state are computed in float32, whatever the dtype policy. They are
    kept in it too, but for a state with a `state_dtype`.

    Args:
        hidden_dim: int, d, the size of inputs and outputs.
        state_dim: int, n, the size of the state of each channel.
        head_dim: int, p, channels a head; divides e.
        num_groups: int, g, heads of one group share B and C; divides h = e / p.
        expansion: float, the inner size e is `expansion * hidden_dim`.
        conv_kernel_size: int, k.
        chunk_size: int, q, positions computed at once. `None` takes the value that is fast on
            the platform. The result does not depend on it beyond rounding.
        use_bias: bool, whether in_proj and out_proj have a bias.
        use_output_bias: bool, whether out_proj has one, if that differs from in_proj.
        use_conv_bias: bool, whether the convolution has a bias.
        gated_norm: string, `"after_gate"` to normalize what is gated, `"before_gate"` to gate what
            is normalized, and `"none"` for the gate alone.
        projection_multipliers: five floats, what in_proj gives for z, x, B, C and dt is multiplied
            by them. `None` for ones.
        layer_norm_epsilon: float, of the gated norm.
        time_step_limit: pair of floats, step sizes are clipped to it. `None` for no limit.
        time_step_min: float, the least step size at initialisation.
        time_step_max: float, the largest step size at initialisation.
        time_step_floor: float, initial step sizes are at least this.
        a_initializer_range: pair of floats, `-A` is drawn from it at initialisation.
        num_residual_layers: int, the number of layers that add to the residual stream; out_proj
            is scaled by its inverse square root at initialisation.
        state_dtype: `"bfloat16"`, in which the SSM state is kept between tokens, in half the
            bytes, rounded stochastically (`ops/stochastic_rounding.py`). `None` for float32.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: tensor `(b t d)`.
        mask: optional boolean tensor `(b t)`, true at real tokens, which are contiguous in
            each row. A padded position changes neither the state nor other outputs.
        segment_ids: optional integer tensor `(b t)`. Convolution and state restart wherever the
            id differs from the position before.

    Reference:
        - [Dao and Gu, 2024](https://arxiv.org/abs/2405.21060), section 7
    """

    layouts: ClassVar = {
        "in_proj/kernel": ("weights", "model"),
        "out_proj/kernel": ("model", "weights"),
        "x": ("batch", "sequence", "model", None),
        "dt": ("batch", "sequence", "model"),
        "[BC]": ("batch", "sequence", None, None),
    }
    kept_dtypes = ("state_dtype",)

    def __init__(
        self,
        hidden_dim: int,
        state_dim: int = 128,
        head_dim: int = 64,
        num_groups: int = 1,
        expansion: float = 2,
        conv_kernel_size: int = 4,
        chunk_size: int | None = None,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        use_output_bias: bool | None = None,
        gated_norm: str = "after_gate",
        projection_multipliers: Sequence[float] | None = None,
        layer_norm_epsilon: float = 1e-5,
        time_step_limit: tuple[float, float | None] | None = None,
        time_step_min: float = 0.001,
        time_step_max: float = 0.1,
        time_step_floor: float = 1e-4,
        a_initializer_range: tuple[float, float] = (1, 16),
        num_residual_layers: int = 1,
        state_dtype: str | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.hidden_dim = hidden_dim
        self.state_dim = state_dim
        self.head_dim = head_dim
        self.num_groups = num_groups
        self.expansion = expansion
        self.conv_kernel_size = conv_kernel_size
        self.chunk_size = chunk_size
        self.use_bias = use_bias
        self.use_conv_bias = use_conv_bias
        self.use_output_bias = use_bias if use_output_bias is None else use_output_bias
        self.gated_norm = gated_norm
        self.projection_multipliers = projection_multipliers
        self.layer_norm_epsilon = layer_norm_epsilon
        self.time_step_limit: Any = time_step_limit  # a pair, once it is checked
        self.time_step_min = time_step_min
        self.time_step_max = time_step_max
        self.time_step_floor = time_step_floor
        self.a_initializer_range = a_initializer_range
        self.num_residual_layers = num_residual_layers
        self.state_dtype = state_dtype
        self._check_config()

        self.inner_dim = round(self.expansion * self.hidden_dim)
        self._check_sizes()
        self.num_heads = self.inner_dim // self.head_dim
        self.group_dim = self.num_groups * self.state_dim
        self.conv_dim = self.inner_dim + 2 * self.group_dim

        self.in_proj = Projection(
            self.inner_dim + self.conv_dim + self.num_heads,
            use_bias=use_bias,
            kernel_initializer=_uniform(),
            dtype=self.dtype_policy,
            name="in_proj",
        )
        self.norm = None
        if gated_norm != "none":
            self.norm = GatedRMSNormalization(
                num_groups=num_groups,
                epsilon=layer_norm_epsilon,
                norm_before_gate=gated_norm == "before_gate",
                dtype=self.dtype_policy,
                name="norm",
            )
        self.out_proj = Projection(
            hidden_dim,
            use_bias=self.use_output_bias,
            kernel_initializer=_uniform(1 / num_residual_layers),
            dtype=self.dtype_policy,
            name="out_proj",
        )

    def _check_config(self):
        check_attributes(
            self,
            hidden_dim=SIZE,
            state_dim=SIZE,
            head_dim=SIZE,
            num_groups=SIZE,
            expansion=POSITIVE,
            conv_kernel_size=SIZE,
            chunk_size=optional(SIZE),
            use_bias=BOOLEAN,
            use_conv_bias=BOOLEAN,
            use_output_bias=BOOLEAN,
            gated_norm=choice(*GATED_NORMS),
            projection_multipliers=optional(several(number(), 5)),
            layer_norm_epsilon=POSITIVE,
            time_step_limit=LIMITS,
            time_step_min=POSITIVE,
            time_step_max=POSITIVE,
            time_step_floor=number(at_least=0),
            a_initializer_range=several(POSITIVE, 2, in_order=True),
            num_residual_layers=SIZE,
            state_dtype=STATE_DTYPE,
        )
        if self.time_step_min > self.time_step_max:
            raise ValueError(
                "`time_step_min` must be at most `time_step_max`. Received: "
                f"time_step_min={self.time_step_min}, time_step_max={self.time_step_max}"
            )

    def _check_sizes(self):
        if self.inner_dim % self.head_dim or not self.inner_dim:
            raise ValueError(
                "`head_dim` must divide the inner size, expansion * hidden_dim. Received: "
                f"head_dim={self.head_dim}, expansion={self.expansion}, "
                f"hidden_dim={self.hidden_dim}, so inner size {self.inner_dim}"
            )
        num_heads = self.inner_dim // self.head_dim
        if num_heads % self.num_groups:
            raise ValueError(
                "`num_groups` must divide the number of heads, expansion * hidden_dim / "
                f"head_dim. Received: num_groups={self.num_groups}, number of heads {num_heads}"
            )

    def build(self, x_shape, mask_shape=None, segment_ids_shape=None):
        if x_shape[-1] != self.hidden_dim:
            raise ValueError(
                f"The input's last axis must be hidden_dim={self.hidden_dim}. "
                f"Received: shape={tuple(x_shape)}"
            )
        self.in_proj.build((None, self.hidden_dim))
        if self.norm is not None:
            self.norm.build((None, self.inner_dim))
        self.out_proj.build((None, self.inner_dim))
        bound = self.conv_kernel_size**-0.5
        self.conv_kernel = self.add_weight(
            name="conv_kernel",
            shape=(self.conv_kernel_size, self.conv_dim),
            initializer=initializers.RandomUniform(-bound, bound),
        )
        self.conv_bias = None
        if self.use_conv_bias:
            self.conv_bias = self.add_weight(
                name="conv_bias",
                shape=(self.conv_dim,),
                initializer=initializers.RandomUniform(-bound, bound),
            )
        float32 = {"shape": (self.num_heads,), "dtype": "float32", "autocast": False}
        self.A_log = self.add_weight(name="A_log", initializer=self._initial_A_log, **float32)
        self.dt_bias = self.add_weight(name="dt_bias", initializer=self._initial_dt_bias, **float32)
        self.D = self.add_weight(name="D", initializer="ones", **float32)

    def _initial_A_log(self, shape, dtype):
        low, high = self.a_initializer_range
        return ops.log(random.uniform(shape, low, high, dtype=dtype))

    def _initial_dt_bias(self, shape, dtype):
        """The inverse softplus of step sizes that are uniform in their logarithm."""
        low, high = math.log(self.time_step_min), math.log(self.time_step_max)
        dt = ops.exp(random.uniform(shape, low, high, dtype=dtype))
        dt = ops.maximum(dt, self.time_step_floor)
        return dt + ops.log(-ops.expm1(-dt))

    def call_with_state(self, x, state=None, mask=None, segment_ids=None):
        b, t = ops.shape(x)[:2]
        gate, xBC, dt = self._project(x)
        xBC, conv_state = causal_conv1d(
            xBC,
            self.conv_kernel,
            self.conv_bias,
            conv_state=None if state is None else state.conv,
            mask=mask,
            segment_ids=segment_ids,
        )
        x, B, C = self._split_conv_output(ops.silu(xBC))
        dt = self._step_sizes(dt)  # (b t h)
        if mask is not None:
            dt = dt * ops.cast(mask, dt.dtype)[..., None]  # a pad leaves the state as it was
        y, ssm_state = distributed_ssd(
            self.path,
            ops.reshape(x, (b, t, self.num_heads, self.head_dim)),
            dt,
            self._A(),
            ops.reshape(B, (b, t, self.num_groups, self.state_dim)),
            ops.reshape(C, (b, t, self.num_groups, self.state_dim)),
            self.D,
            initial_state=None if state is None else self._read(state),
            segment_ids=segment_ids,
            chunk_size=self.chunk_size or default_chunk_size(),
        )
        y = self._gated(ops.reshape(y, (b, t, self.inner_dim)), gate)
        count = self._count(mask, b, t)
        return self.out_proj(y), self._state(conv_state, ssm_state, state, count)

    def step(self, x, state, mask=None):
        b = ops.shape(x)[0]
        gate, xBC, dt = self._project(x)
        xBC, conv_state = causal_conv1d_step(
            xBC, self.conv_kernel, self.conv_bias, conv_state=state.conv
        )
        dt = self._step_sizes(dt)  # (b h)
        if mask is not None:
            conv_state = ops.where(mask[:, None, None], conv_state, state.conv)
            dt = dt * ops.cast(mask, dt.dtype)[:, None]
        x, B, C = self._split_conv_output(ops.silu(xBC))
        y, ssm_state = ssd_step(
            ops.reshape(x, (b, self.num_heads, self.head_dim)),
            dt,
            self._A(),
            ops.reshape(B, (b, self.num_groups, self.state_dim)),
            ops.reshape(C, (b, self.num_groups, self.state_dim)),
            self.D,
            state=self._read(state),
        )
        y = self._gated(ops.reshape(y, (b, self.inner_dim)), gate)
        count = self._count(mask, b, 1)
        return self.out_proj(y), self._state(conv_state, ssm_state, state, count)

    def extend(self, x, state, chunk: MixerChunk, start):
        b, t = ops.shape(x)[:2]
        gate, xBC, dt = self._project(x)
        inputs = put_tokens(chunk.conv, xBC, start)
        xBC = causal_conv1d_extend(
            inputs, t, self.conv_kernel, self.conv_bias, conv_state=state.conv, start=start
        )
        x, B, C = self._split_conv_output(ops.silu(xBC))
        chunk = MixerChunk(
            inputs,
            put_tokens(chunk.x, x, start),
            put_tokens(chunk.dt, self._step_sizes(dt), start),
            put_tokens(chunk.B, B, start),
        )
        C = ops.reshape(C, (b, t, self.num_groups, self.state_dim))
        y = open_chunk_output(*self._inputs(chunk), C, self.D, state=self._read(state), start=start)
        y = self._gated(ops.reshape(y, (b, t, self.inner_dim)), gate)
        return self.out_proj(y), chunk

    def commit(self, state, chunk: MixerChunk, count) -> MixerState | RoundedMixerState:
        conv = causal_conv1d_commit(chunk.conv, conv_state=state.conv, count=count)
        ssm = commit_chunk(*self._inputs(chunk), state=self._read(state), count=count)
        return self._state(conv, ssm, state, count)

    def _read(self, state: MixerState | RoundedMixerState):
        """The SSM state in the dtype that it is computed in."""
        return ops.cast(state.ssm, float32_at_least(state.ssm.dtype))

    def _count(self, mask, b, t):
        """How many of t tokens are real, `(b)`; None where no state counts them."""
        if self.state_dtype is None:
            return None
        real = ops.ones((b, t), "int32") if mask is None else ops.cast(mask, "int32")
        return ops.sum(ops.reshape(real, (b, t)), axis=1)

    def _state(self, conv, ssm, before, count) -> MixerState | RoundedMixerState:
        """The state as it is kept, `count` `(b)` tokens after `before`."""
        if self.state_dtype is None:
            return MixerState(conv, ssm)
        length = ops.cast(count, "int32") + (0 if before is None else before.length)
        return RoundedMixerState(conv, stochastic_round(ops.cast(ssm, "float32"), length), length)

    def _inputs(self, chunk: MixerChunk) -> tuple[Any, Any, Any, Any]:
        """x, dt, A and B of the tokens of an open chunk, as `ssd` takes them."""
        b, q = ops.shape(chunk.x)[:2]
        x = ops.reshape(chunk.x, (b, q, self.num_heads, self.head_dim))
        B = ops.reshape(chunk.B, (b, q, self.num_groups, self.state_dim))
        return x, chunk.dt, self._A(), B

    def chunk_spec(self, size: int) -> MixerChunk:
        return MixerChunk(
            conv=StateTensor((size, self.conv_dim), self.compute_dtype),
            x=StateTensor((size, self.inner_dim), self.compute_dtype),
            dt=StateTensor((size, self.num_heads), self.dt_bias.dtype),
            B=StateTensor((size, self.group_dim), self.compute_dtype),
        )

    def state_spec(self, max_length: int | None = None) -> MixerState | RoundedMixerState:
        """Of one size, whatever `max_length` is."""
        conv = StateTensor((self.conv_kernel_size - 1, self.conv_dim), self.compute_dtype)
        shape = (self.num_heads, self.head_dim, self.state_dim)
        if self.state_dtype is None:
            return MixerState(conv, StateTensor(shape, "float32"))
        return RoundedMixerState(
            conv, StateTensor(shape, self.state_dtype), StateTensor((), "int32")
        )

    @property
    def projections(self) -> tuple[Projection, Projection]:
        return self.in_proj, self.out_proj

    @property
    def weight_axes(self) -> dict[str, dict[str, int]]:
        projected = self.inner_dim + self.conv_dim + self.num_heads
        return {
            "out_proj/kernel": {"num_heads": self.num_heads, "hidden_dim": self.hidden_dim},
            "in_proj/kernel": {
                "hidden_dim": self.hidden_dim,
                "2 * inner_dim + 2 * num_groups * state_dim + num_heads": projected,
            },
        }

    def _project(self, x):
        """The gate `(... e)`, the convolution's input `(... e+2gn)`, and dt `(... h)`."""
        cuts = [self.inner_dim, self.inner_dim + self.conv_dim]
        projected = ops.cast(self.in_proj(x), self.compute_dtype)  # policies may differ
        if self.projection_multipliers is not None:
            sizes = (self.inner_dim, self.inner_dim, self.group_dim, self.group_dim, self.num_heads)
            multipliers = np.repeat(self.projection_multipliers, sizes)
            projected = projected * ops.convert_to_tensor(multipliers, projected.dtype)
        return ops.split(projected, cuts, axis=-1)

    def _gated(self, y, gate):
        if self.norm is not None:
            return self.norm(y, gate)
        dtype = float32_at_least(self.compute_dtype)
        y = ops.cast(y, dtype) * ops.silu(ops.cast(gate, dtype))
        return ops.cast(y, self.compute_dtype)

    def _split_conv_output(self, xBC):
        return ops.split(xBC, [self.inner_dim, self.inner_dim + self.group_dim], axis=-1)

    def _step_sizes(self, dt):
        dt = ops.softplus(ops.cast(dt, self.dt_bias.dtype) + self.dt_bias)
        low, high = self.time_step_limit
        dt = ops.maximum(dt, low) if low > 0 else dt
        return dt if high is None else ops.minimum(dt, high)

    def _A(self):
        return -ops.exp(ops.convert_to_tensor(self.A_log))

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "hidden_dim": self.hidden_dim,
                "state_dim": self.state_dim,
                "head_dim": self.head_dim,
                "num_groups": self.num_groups,
                "expansion": self.expansion,
                "conv_kernel_size": self.conv_kernel_size,
                "chunk_size": self.chunk_size,
                "use_bias": self.use_bias,
                "use_conv_bias": self.use_conv_bias,
                "use_output_bias": self.use_output_bias,
                "gated_norm": self.gated_norm,
                "projection_multipliers": self.projection_multipliers,
                "layer_norm_epsilon": self.layer_norm_epsilon,
                "time_step_limit": self.time_step_limit,
                "time_step_min": self.time_step_min,
                "time_step_max": self.time_step_max,
                "time_step_floor": self.time_step_floor,
                "a_initializer_range": self.a_initializer_range,
                "num_residual_layers": self.num_residual_layers,
                "state_dtype": self.state_dtype,
            }
        )
        return config


def _uniform(scale=1.0):
    """Uniform in +-sqrt(scale / fan_in), as the reference's linear layers."""
    return initializers.VarianceScaling(scale / 3, mode="fan_in", distribution="uniform")
