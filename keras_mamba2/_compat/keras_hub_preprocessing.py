"""Private parts of KerasHub's tokenizers and preprocessors."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras_hub
from keras_hub.src.utils import tensor_utils


def in_tf_function() -> bool:
    """Whether TensorFlow traces a function, as in a `tf.data` pipeline; false without TensorFlow.

    `tensor_utils.in_tf_function`, since the public name would import TensorFlow. Written for
    KerasHub 0.32.
    """
    return tensor_utils.in_tf_function()


def uses_tensorflow(layer: keras_hub.layers.StartEndPacker) -> bool:
    """Whether a preprocessing layer, or tokenizer, takes its way through TensorFlow now.

    `_use_tf_workflow`. Written for KerasHub 0.32.
    """
    return layer._use_tf_workflow()


def preprocessing_function(method: Callable) -> Callable:
    """Decorates a method that gets and gives tensors of TensorFlow: outside, they are others.

    `tensor_utils.preprocessing_function`. The first argument, and `y` and `sample_weight`, are
    converted. Written for KerasHub 0.32.
    """
    return tensor_utils.preprocessing_function(method)


def convert_preprocessing_outputs_python(outputs) -> Any:
    """What a preprocessor returns: arrays become tensors, except inside grain.

    `tensor_utils.convert_preprocessing_outputs_python`. Written for KerasHub 0.32.
    """
    return tensor_utils.convert_preprocessing_outputs_python(outputs)


def canonicalize_python_string_inputs(inputs) -> tuple[list[str], bool, Any]:
    """The strings in what a tokenizer gets, whether it was a batch, and its shape.

    `tensor_utils.canonicalize_python_string_inputs`. The shape, `None` for less than two axes, is
    one for `restore_outer_shape`. Written for KerasHub 0.32.
    """
    return tensor_utils.canonicalize_python_string_inputs(inputs)


def restore_outer_shape(rows: Sequence, outer_shape) -> list:
    """Nests one result a string as the strings were nested.

    `tensor_utils.restore_outer_shape`. Written for KerasHub 0.32.
    """
    return tensor_utils.restore_outer_shape(rows, outer_shape)


def canonicalize_python_token_inputs(inputs) -> tuple[list[list[int]], bool]:
    """The rows of token ids in what `detokenize` gets, and whether it was a batch.

    `tensor_utils.canonicalize_python_token_inputs`. Written for KerasHub 0.32.
    """
    return tensor_utils.canonicalize_python_token_inputs(inputs)


def add_special_token(tokenizer: keras_hub.tokenizers.Tokenizer, token: str, name: str) -> None:
    """Makes `token` a special one of `tokenizer`, as the attributes `name` and `<name>_id`.

    `_add_special_token`. Written for KerasHub 0.32.
    """
    tokenizer._add_special_token(token, name)


def update_special_token_ids(tokenizer: keras_hub.tokenizers.Tokenizer) -> None:
    """Sets the ids of special tokens once there is a vocabulary.

    `_update_special_token_ids`. Written for KerasHub 0.32.

    Raises:
        ValueError: for a special token that is not in the vocabulary.
    """
    tokenizer._update_special_token_ids()
