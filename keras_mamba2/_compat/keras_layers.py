"""Private parts of `keras.layers`."""

import contextlib
from collections.abc import Iterator

import keras
from keras.src.backend.common.masking import get_keras_mask
from keras.src.quantizers.quantization_config import get_block_size_for_layer
from keras.src.quantizers.utils import should_quantize_layer


def flatten_layers(
    layer: keras.layers.Layer, include_self: bool = True
) -> list[keras.layers.Layer]:
    """The layers in `layer` at every depth, each once, in the order of KerasHub's files of LoRA.

    `_flatten_layers`, since `Model.layers` has only those of the model itself. Written for Keras
    3.15.
    """
    return layer._flatten_layers(include_self=include_self)


def keras_mask(x):
    """The mask that comes with a tensor from other layers, or `None`.

    `get_keras_mask`. Written for Keras 3.15.
    """
    return get_keras_mask(x)


def untrack_variable(layer: keras.layers.Layer, variable: keras.Variable) -> None:
    """Takes `variable` out of the weights of `layer`, also after `build`.

    `_untrack_variable`, since `del` of the attribute also collects garbage, which takes a quarter
    of a second each time. Written for Keras 3.15.
    """
    layer._untrack_variable(variable)


@contextlib.contextmanager
def unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Lets `layer` have more weights, also after `build`.

    `_tracker`, as `enable_lora` of Keras' own layers. Written for Keras 3.15.
    """
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


@contextlib.contextmanager
def own_policy(layer: keras.layers.Layer) -> Iterator[None]:
    """Shows Keras the dtype policy of `layer` alone, where it has one from a map of policies.

    `_dtype_policy`, since layers of Keras ask a map for its name and its mode, which are those of
    its default. A policy that `layer` gets meanwhile goes into the map. Written for Keras 3.15.
    """
    policies = layer._dtype_policy
    if not isinstance(policies, keras.dtype_policies.DTypePolicyMap):
        yield
        return
    before = layer._dtype_policy = policies[layer.path]
    try:
        yield
    finally:
        after, layer._dtype_policy = layer._dtype_policy, policies
        if after is not before:
            layer.dtype_policy = after


def is_chosen(layer: keras.layers.Layer, filters) -> bool:
    """Whether `filters` of `keras.Model.quantize` choose `layer`.

    `should_quantize_layer`. Written for Keras 3.15.
    """
    return should_quantize_layer(layer, filters)


def int4_block_size(layer: keras.layers.Layer, config=None) -> int | None:
    """How many inputs share a scale in int4, by `config` or the policy of `layer`; `None` for all.

    `get_block_size_for_layer`, since a layer can have its policy from a map. Written for Keras
    3.15.
    """
    size = get_block_size_for_layer(layer, config)
    return None if size == -1 else size


def has_equal_groups(layer: keras.layers.Layer, size: int) -> bool:
    """Whether an int4 layer has groups of equal numbers of its `size` inputs, and no more to do.

    `inputs_quantizer` is one that Keras calls on activations. Written for Keras 3.15.
    """
    block_size = int4_block_size(layer)
    if block_size is None or layer.inputs_quantizer is not None:
        return False
    return size <= block_size or size % block_size == 0


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
