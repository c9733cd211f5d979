import keras


@keras.saving.register_keras_serializable(package="keras_mamba2")
class ReversibleEmbedding(keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding`, whose quantized head lets gradients through.

    The head, `reverse=True`, multiplies hidden states with quantized weights as they are. Keras
    3.15 rounds them to int8 first, in int4 only once the model was saved and loaded. No gradient
    passes a rounding, so that LoRA adapters below the head would not learn.

    float8, GPTQ and AWQ are for matrix products alone; they leave this layer as it is.

    Args:
        *args: see `keras.layers.ReversibleEmbedding`.
        **kwargs: as there.
    """

    def quantize(self, mode=None, type_check: bool = True, config=None) -> None:
        if mode in ("int8", "int4"):
            # Keras refuses subclasses, since their `call` may differ.
            super().quantize(mode, type_check=False, config=config)

    def quantized_build(self, embeddings_shape, mode, config=None) -> None:
        super().quantized_build(embeddings_shape, mode, config)
        self.inputs_quantizer = None
