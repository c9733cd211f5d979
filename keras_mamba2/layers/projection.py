import keras
from keras import ops
from keras import quantizers

from keras_mamba2._compat.keras_layers import has_equal_groups
from keras_mamba2._compat.keras_layers import own_policy
from keras_mamba2._compat.keras_layers import stored_kernel
from keras_mamba2._compat.keras_layers import untrack_variable
from keras_mamba2._compat.keras_variables import never_autocast
from keras_mamba2.arguments import SIZE
from keras_mamba2.ops.int4 import int4_matmul
from keras_mamba2.ops.int4 import on_tpu
from keras_mamba2.ops.matrix import int8_matmul
from keras_mamba2.ops.matrix import matmul

# Quantized with the help of calibration data.
CALIBRATED_MODES = ("gptq", "awq")
# What Keras trains LoRA adapters on.
LORA_MODES = (None, "int8", "int4")


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Projection(keras.layers.Dense):
    """`keras.layers.Dense`, with LoRA and quantization whole where those of Keras 3.15 are not.

    - On a CPU, int8 and bfloat16 are as fast as they can be: see `ops/matrix.py`, which wants int8
      kernels as `(out in)`.
    - GPTQ and AWQ get their calibration data. Keras listens at `call`, which a layer that is being
      quantized does not pass through, so that both would round to nearest.
    - The zero points of GPTQ and AWQ are saved, without which the layer cannot be loaded.
    - The index of an input's group is not rounded, to that of another group, in bfloat16.
    - A LoRA adapter still learns after weights were loaded into the layer. Keras leaves both
      factors zero, and with them both gradients, for ever.

    Args:
        units: int, the size of outputs.
        *args: see `keras.layers.Dense`.
        **kwargs: as there.
    """

    def __init__(self, units: int, *args, **kwargs):
        super().__init__(SIZE("units", units), *args, **kwargs)

    def call(self, inputs, training=None):
        return self._finish(matmul(inputs, self.kernel))

    def lora_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of an adapter's factors."""
        return (self.input_spec.axes[-1], rank), (rank, self.units)

    def _finish(self, x):
        x = x if self.bias is None else x + self.bias
        return x if self.activation is None else self.activation(x)

    @property
    def kernel(self):
        if self.quantization_mode != "int8":
            return super().kernel
        return ops.transpose(stored_kernel(self))

    def check_mode(self, mode: str) -> None:
        """Raises for an adapter that is not combined with `mode`."""
        if self.lora_enabled and mode not in LORA_MODES:
            raise ValueError(
                f"Layer {self.path!r} has a LoRA adapter, which Keras does not combine with "
                f"mode={mode!r}. Call `backbone.merge_lora()` before `quantize`, or take one of "
                f"the modes {', '.join(LORA_MODES[1:])}."
            )

    def quantize(self, mode=None, type_check: bool = True, config=None) -> None:
        self.check_mode(mode)
        with own_policy(self):
            if mode == "int8":
                self._quantize_int8(config)
            else:
                # Keras refuses subclasses, since their `call` may differ.
                super().quantize(mode, type_check=False, config=config)

    def _quantize_int8(self, config) -> None:
        """As Keras does it, but for the kernel's orientation."""
        quantizer = quantizers.QuantizationConfig.weight_quantizer_or_default(
            config, quantizers.AbsMaxQuantizer(axis=0)
        )
        shape = stored_kernel(self).shape
        kernel, scale = quantizer(stored_kernel(self), to_numpy=True)
        untrack_variable(self, stored_kernel(self))
        self.quantization_config = config
        self.quantized_build(shape, "int8", config)
        stored_kernel(self).assign(ops.transpose(kernel))
        self.kernel_scale.assign(ops.squeeze(scale, axis=0))
        name = f"int8_from_{self.dtype_policy.name}"  # type: ignore[has-type]
        self.dtype_policy = keras.dtype_policies.get(name)

    def _int8_build(self, kernel_shape, config=None) -> None:
        super()._int8_build(kernel_shape[::-1], config)  # (out in)

    def _int8_call(self, inputs, training=None):
        x = int8_matmul(inputs, stored_kernel(self), self.kernel_scale, self.inputs_quantizer)
        return self._finish(self._with_adapter(x, inputs))

    def _int4_call(self, inputs, training=None):
        in_keras = super()._int4_call
        if self.units % 2 or not has_equal_groups(self, self.input_spec.axes[-1]):
            return in_keras(inputs, training)

        def product(x):
            parts = stored_kernel(self), self.kernel_scale, self.kernel_zero
            kernel, scale, zero = map(ops.convert_to_tensor, parts)
            y = int4_matmul(x, kernel, scale, zero)
            return self._finish(self._with_adapter(y, x))

        return on_tpu(product, in_keras, inputs)

    def _with_adapter(self, x, inputs):
        if not self.lora_enabled:
            return x
        lora_x = ops.matmul(ops.matmul(inputs, self.lora_kernel_a), self.lora_kernel_b)
        return x + ops.cast(self.lora_alpha / self.lora_rank * lora_x, x.dtype)

    def _get_kernel_with_merged_lora(self):
        if not self.lora_enabled or self.quantization_mode not in (None, "int8"):
            with own_policy(self):
                return super()._get_kernel_with_merged_lora()
        adapter = ops.matmul(self.lora_kernel_a, self.lora_kernel_b)
        adapter = self.lora_alpha / self.lora_rank * adapter
        if self.quantization_mode is None:
            # Not in the `compute_dtype`, as Keras does it: what is saved are the weights.
            kernel = ops.add(stored_kernel(self), adapter)
            return ops.cast(kernel, self.variable_dtype), None, None
        kernel = ops.cast(self.kernel, self.compute_dtype) / self.kernel_scale + adapter
        kernel, scale = quantizers.abs_max_quantize(kernel, axis=0, to_numpy=True)
        return ops.transpose(kernel), ops.squeeze(scale, axis=0), None

    def quantized_build(self, kernel_shape, mode, config=None) -> None:
        super().quantized_build(kernel_shape, mode, config)
        if hasattr(self, "g_idx"):
            never_autocast(self.g_idx)

    def quantized_call(self, *args, **kwargs):
        if self.waits_for_calibration:
            return self.call(*args, **kwargs)
        return super().quantized_call(*args, **kwargs)

    @property
    def waits_for_calibration(self) -> bool:
        """Whether it computes with its old weights yet, and the quantized ones are zeros."""
        mode = self.quantization_mode
        return mode in CALIBRATED_MODES and not getattr(self, f"is_{mode}_calibrated")

    def save_own_variables(self, store) -> None:
        if self.quantization_mode not in CALIBRATED_MODES:
            super().save_own_variables(store)
            return
        names = self.variable_serialization_spec[self.quantization_mode]
        names = [name for name in names if name != "bias" or self.use_bias]
        for i, name in enumerate(names):
            store[str(i)] = getattr(self, name)

    def load_own_variables(self, store) -> None:
        factor = ops.copy(self.lora_kernel_a) if self.lora_enabled else None
        super().load_own_variables(store)
        if factor is not None:
            self.lora_kernel_a.assign(factor)
