from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_mamba2._compat.keras_layers import int4_block_size
from keras_mamba2._compat.keras_layers import own_policy
from keras_mamba2._compat.keras_layers import unlocked
from keras_mamba2._compat.keras_layers import untrack_variable
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_keywords
from keras_mamba2.layers.projection import Projection
from keras_mamba2.ops.checks import float32_at_least
from keras_mamba2.ops.rounding import Packed
from keras_mamba2.ops.rounding import Rounded
from keras_mamba2.ops.rounding import packed
from keras_mamba2.ops.rounding import restored
from keras_mamba2.ops.rounding import rounded

MODES = ("int8", "int4")


@keras.saving.register_keras_serializable(package="keras_mamba2")
class ExpertsProjection(keras.layers.Layer):
    """A matrix for each expert, with LoRA and quantization as those of `Projection`.

    Each expert has an adapter of its own. In int8 and int4 only weights are rounded; in other
    modes of quantization they stay as they are.

    Args:
        num_experts: int, e.
        units: int, the size of outputs.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: tensor, rows `(... in)` in an order that `matmul` knows.
        matmul: function of rows and kernels `(e in out)`, which multiplies each row by that of its
            expert. See `ops/experts.py: grouped_matmul`.
    """

    bias = None

    def __init__(self, num_experts: int, units: int, **kwargs):
        check_keywords(type(self), kwargs)
        super().__init__(**kwargs)
        self.num_experts = SIZE("num_experts", num_experts)
        self.units = SIZE("units", units)
        self.lora_enabled = False
        self.lora_rank: Any = None
        self.lora_alpha: Any = None

    def build(self, x_shape):
        self.kernel_shape = self.num_experts, x_shape[-1], self.units
        mode = self.quantization_mode
        if mode in MODES:
            self._add_rounded(mode, int4_block_size(self))
            return
        bound = x_shape[-1] ** -0.5
        initializer = keras.initializers.RandomUniform(-bound, bound)
        self.kernel = self.add_weight(
            name="kernel", shape=self.kernel_shape, initializer=initializer
        )

    def call(self, x, matmul: Callable):
        y = matmul(x, self._as_stored())
        if not self.lora_enabled:
            return y
        a, b = (ops.cast(a, x.dtype) for a in (self.lora_kernel_a, self.lora_kernel_b))
        return y + ops.cast(self.lora_alpha / self.lora_rank, x.dtype) * matmul(matmul(x, a), b)

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def _as_stored(self):
        """The kernels without adapters, as `ops/experts.py` takes them."""
        kernel, *others = map(ops.convert_to_tensor, self._stored)
        if self.quantization_mode == "int8":
            return Rounded(kernel, *others)
        if self.quantization_mode == "int4":
            scale, zero = others
            return Packed(kernel, scale, zero, self._group_size)
        return kernel

    @property
    def _stored(self) -> list[keras.Variable]:
        names = {"int8": ("kernel_scale",), "int4": ("kernel_scale", "kernel_zero")}
        return [self.kernel, *(getattr(self, n) for n in names.get(self.quantization_mode, ()))]

    def _add_rounded(self, mode: str, block_size: int | None) -> None:
        e, n_in, n_out = self.kernel_shape
        self._group_size = min(block_size or n_in, n_in)
        groups = 1 if mode == "int8" else -(-n_in // self._group_size)
        columns = n_out if mode == "int8" else -(-n_out // 2)

        def add(name, shape, dtype):
            fixed: dict[str, Any] = {"initializer": "zeros", "trainable": False, "autocast": False}
            return self.add_weight(name=name, shape=shape, dtype=dtype, **fixed)

        self.kernel = add("kernel", (e, n_in, columns), "int8")
        self.kernel_scale = add("kernel_scale", (e, groups, n_out), self.variable_dtype)
        if mode == "int4":
            self.kernel_zero = add("kernel_zero", (e, groups, n_out), "int8")

    def quantize(self, mode=None, type_check: bool = True, config=None) -> None:
        """To int8 or int4. In other modes the matrices stay as they are."""
        if mode not in MODES:
            return
        kernel = self.kernel
        block_size = int4_block_size(self, config)
        untrack_variable(self, kernel)
        self._add_rounded(mode, block_size)
        self._is_quantized = True  # or Keras would quantize when it hears of the policy
        name = mode if mode == "int8" else f"int4/{block_size or -1}"
        with own_policy(self):
            policy = f"{name}_from_{self.dtype_policy.name}"  # type: ignore[has-type]
            self.dtype_policy = keras.dtype_policies.get(policy)
        for variable, value in zip(self._stored, self._rounded(kernel), strict=True):
            variable.assign(value)

    def _rounded(self, kernel) -> list[Any]:
        """Values of `_stored` for a kernel in floating point."""
        if self.quantization_mode not in MODES:
            return [ops.cast(kernel, self.variable_dtype)]
        kernel = ops.cast(kernel, float32_at_least(kernel.dtype))
        if self.quantization_mode == "int8":
            return list(rounded(kernel, axis=1))
        return list(packed(kernel, self._group_size)[:-1])

    def lora_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of an adapter's factors."""
        e, n_in, n_out = self.kernel_shape
        return (e, n_in, rank), (e, rank, n_out)

    def enable_lora(self, rank: int, lora_alpha: float | None = None) -> None:
        """As `keras.layers.Dense.enable_lora`, for each expert."""
        shape_of_a, shape_of_b = self.lora_shapes(rank)
        bound = (6 / self.kernel_shape[1]) ** 0.5  # of "he_uniform" in a matrix
        uniform = keras.initializers.RandomUniform(-bound, bound)
        with unlocked(self):
            self.lora_kernel_a = self.add_weight(
                name="lora_kernel_a", shape=shape_of_a, initializer=uniform, dtype="float32"
            )
            self.lora_kernel_b = self.add_weight(
                name="lora_kernel_b", shape=shape_of_b, initializer="zeros", dtype="float32"
            )
        self.kernel.trainable = False
        self.lora_enabled, self.lora_rank = True, rank
        self.lora_alpha = rank if lora_alpha is None else lora_alpha

    def save_own_variables(self, store) -> None:
        """With an adapter, the weights that it makes, as Keras does it."""
        values = self._stored
        if self.lora_enabled:
            kernel = self._as_stored()
            if self.quantization_mode in MODES:
                kernel = restored(kernel, float32_at_least(self.variable_dtype))
            product = ops.matmul(self.lora_kernel_a, self.lora_kernel_b)
            values = self._rounded(kernel + self.lora_alpha / self.lora_rank * product)
        for i, value in enumerate(values):
            store[str(i)] = value

    def load_own_variables(self, store) -> None:
        for i, variable in enumerate(self._stored):
            variable.assign(store[str(i)])
        if self.lora_enabled:  # the adapter is in what was saved, and learns on from zero
            self.lora_kernel_b.assign(ops.zeros(self.lora_kernel_b.shape))

    def compute_output_spec(self, x, matmul):
        return keras.KerasTensor((*x.shape[:-1], self.units), dtype=self.compute_dtype)

    def get_config(self):
        config = super().get_config()
        config.update({"num_experts": self.num_experts, "units": self.units})
        return config


AnyProjection = Projection | ExpertsProjection
