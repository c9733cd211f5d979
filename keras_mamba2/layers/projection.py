import keras

# Quantized with the help of calibration data.
CALIBRATED_MODES = ("gptq", "awq")
# What Keras trains LoRA adapters on.
LORA_MODES = (None, "int8", "int4")


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Projection(keras.layers.Dense):
    """`keras.layers.Dense`, with LoRA and quantization whole where those of Keras 3.15 are not.

    - GPTQ and AWQ get their calibration data. Keras listens at `call`, which a layer that is being
      quantized does not pass through, so that both would round to nearest.
    - The zero points of GPTQ and AWQ are saved, without which the layer cannot be loaded.
    - The index of an input's group is not rounded, to that of another group, in bfloat16.
    - A LoRA adapter still learns after weights were loaded into the layer. Keras leaves both
      factors zero, and with them both gradients, for ever.

    Args:
        *args: see `keras.layers.Dense`.
        **kwargs: as there.
    """

    def quantize(self, mode=None, type_check: bool = True, config=None) -> None:
        if self.lora_enabled and mode not in LORA_MODES:
            raise ValueError(
                f"Layer {self.path!r} has a LoRA adapter, which Keras does not combine with "
                f"mode={mode!r}. Call `backbone.merge_lora()` before `quantize`, or take one of "
                f"the modes {', '.join(LORA_MODES[1:])}."
            )
        # Keras refuses subclasses, since their `call` may differ.
        super().quantize(mode, type_check=False, config=config)

    def quantized_build(self, kernel_shape, mode, config=None) -> None:
        super().quantized_build(kernel_shape, mode, config)
        if hasattr(self, "g_idx"):
            self.g_idx._autocast = False

    def quantized_call(self, *args, **kwargs):
        if self.quantization_mode in CALIBRATED_MODES and not self._is_calibrated:
            return self.call(*args, **kwargs)
        return super().quantized_call(*args, **kwargs)

    @property
    def _is_calibrated(self) -> bool:
        return getattr(self, f"is_{self.quantization_mode}_calibrated")

    def save_own_variables(self, store) -> None:
        if self.quantization_mode not in CALIBRATED_MODES:
            super().save_own_variables(store)
            return
        names = self.variable_serialization_spec[self.quantization_mode]
        names = [name for name in names if name != "bias" or self.use_bias]
        for i, name in enumerate(names):
            store[str(i)] = getattr(self, name)

    def load_own_variables(self, store) -> None:
        factor = keras.ops.copy(self.lora_kernel_a) if self.lora_enabled else None
        super().load_own_variables(store)
        if factor is not None:
            self.lora_kernel_a.assign(factor)
