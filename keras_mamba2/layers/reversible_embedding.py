import functools

import keras
from keras import ops

from keras_mamba2._compat.keras_layers import has_equal_groups
from keras_mamba2._compat.keras_layers import own_policy
from keras_mamba2._compat.keras_layers import stored_embeddings
from keras_mamba2.ops.int4 import int4_matmul_transposed
from keras_mamba2.ops.int4 import int4_rows
from keras_mamba2.ops.int4 import on_tpu
from keras_mamba2.ops.matrix import int8_matmul
from keras_mamba2.ops.matrix import matmul
from keras_mamba2.ops.matrix import take_rows


@keras.saving.register_keras_serializable(package="keras_mamba2")
class ReversibleEmbedding(keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding`, fast on a CPU and trainable through a quantized head.

    The head, `reverse=True`, rounds hidden states to int8 in int8, not in int4, and its gradient is
    as if it did not. Keras 3.15 rounds both, int4 only once the model was saved and loaded, and no
    gradient passes its rounding, so that LoRA adapters below the head would not learn.

    float8, GPTQ and AWQ are for matrix products alone; they leave this layer as it is.

    Args:
        *args: see `keras.layers.ReversibleEmbedding`.
        **kwargs: as there.
    """

    def quantize(self, mode=None, type_check: bool = True, config=None) -> None:
        if mode in ("int8", "int4"):
            # Keras refuses subclasses, since their `call` may differ.
            with own_policy(self):
                super().quantize(mode, type_check=False, config=config)

    def call(self, inputs, reverse: bool = False):
        if self.mask_zero or self.logit_soft_cap is not None or self.reverse_dtype is not None:
            return super().call(inputs, reverse)
        if not reverse:
            token_ids = ops.cast(inputs, "int32")
            rows = take_rows(ops.convert_to_tensor(self.embeddings), token_ids)
            return ops.cast(rows, self.compute_dtype)
        if self.tie_weights:
            return matmul(inputs, self.embeddings, "ed")
        return matmul(inputs, self.reverse_embeddings)

    def quantized_build(self, embeddings_shape, mode, config=None) -> None:
        super().quantized_build(embeddings_shape, mode, config)
        if mode == "int4":
            self.inputs_quantizer = None

    def _get_embeddings_with_merged_lora(self):
        with own_policy(self):
            return super()._get_embeddings_with_merged_lora()

    def _int8_call(self, inputs, reverse: bool = False):
        if not reverse or self.logit_soft_cap is not None:
            return super()._int8_call(inputs, reverse)
        if self.tie_weights:
            kernel, scale = stored_embeddings(self), self.embeddings_scale
        else:
            kernel, scale = ops.transpose(self.reverse_embeddings), self.reverse_embeddings_scale
        return int8_matmul(inputs, kernel, scale, self.inputs_quantizer)

    def _int4_call(self, inputs, reverse: bool = False):
        in_keras = functools.partial(super()._int4_call, reverse=reverse)
        is_even = self.output_dim % (2 * self.embeddings_scale.shape[-1]) == 0
        if not is_even or not has_equal_groups(self, self.output_dim):
            return in_keras(inputs)
        if self.logit_soft_cap is not None:
            return in_keras(inputs)
        if not reverse and self.lora_enabled:
            return in_keras(inputs)
        parts = stored_embeddings(self), self.embeddings_scale, self.embeddings_zero
        if reverse and not self.tie_weights:
            parts = self.reverse_embeddings, self.reverse_embeddings_scale
            parts = map(ops.transpose, (*parts, self.reverse_embeddings_zero))
        kernel, scale, zero = map(ops.convert_to_tensor, parts)
        if not reverse:
            ids = ops.cast(inputs, "int32")
            return int4_rows(kernel, scale, zero, ids, self.compute_dtype)
        return on_tpu(
            lambda x: int4_matmul_transposed(x, kernel, scale, zero),
            lambda x: ops.cast(in_keras(x), x.dtype),  # which is float32 in float16 too
            inputs,
        )
