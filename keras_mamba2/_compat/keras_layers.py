"""Private parts of `keras.layers`."""

import keras


def flatten_layers(
    layer: keras.layers.Layer, include_self: bool = True
) -> list[keras.layers.Layer]:
    """The layers in `layer` at every depth, each once, in the order of KerasHub's files of LoRA.

    `_flatten_layers`, since `Model.layers` has only those of the model itself. Written for Keras
    3.15.
    """
    return layer._flatten_layers(include_self=include_self)


def untrack_variable(layer: keras.layers.Layer, variable: keras.Variable) -> None:
    """Takes `variable` out of the weights of `layer`, also after `build`.

    `_untrack_variable`, since `del` of the attribute also collects garbage, which takes a quarter
    of a second each time. Written for Keras 3.15.
    """
    layer._untrack_variable(variable)


def stored_kernel(layer: keras.layers.Dense) -> keras.Variable:
    """The variable behind `layer.kernel`, without LoRA, as it is stored when quantized.

    `_kernel`, since `kernel` adds the adapter. Written for Keras 3.15.
    """
    return layer._kernel


def stored_embeddings(layer: keras.layers.Embedding) -> keras.Variable:
    """The variable behind `layer.embeddings`, without LoRA, as it is stored when quantized.

    `_embeddings`, since `embeddings` adds the adapter. Written for Keras 3.15.
    """
    return layer._embeddings
