"""Prompts as strings, in any of the forms that strings have."""

from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import numpy as np


def is_one_text(inputs: Any) -> bool:
    """Whether `inputs` is a string, in any of the forms that strings have."""
    return isinstance(inputs, (str, bytes)) or (hasattr(inputs, "shape") and inputs.shape == ())


def texts_of(inputs: Any) -> list[str]:
    """The strings in a string, or in a list, tuple, array or tensor of them.

    Raises:
        ValueError: for anything else, and for text that cannot be written as UTF-8.
    """
    if isinstance(inputs, Mapping):
        raise ValueError("A model with a `preprocessor` reads text. Received: a dict")
    if hasattr(inputs, "numpy") and not isinstance(inputs, np.ndarray):  # of TensorFlow
        inputs = inputs.numpy()
    if is_one_text(inputs):
        inputs = [inputs.item() if hasattr(inputs, "item") else inputs]
    if not isinstance(inputs, Iterable):
        raise ValueError(f"A prompt must be a string. Received: {inputs!r}")
    return [_text(i, text) for i, text in enumerate(inputs)]


def _text(i: int, text: Any) -> str:
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8")
        if isinstance(text, str):
            text.encode("utf-8")  # half of a surrogate pair is no character
            return str(text)
    except UnicodeError as error:
        raise ValueError(f"Text {i} is no UTF-8: {error}") from None
    raise ValueError(f"A prompt must be a string. Received, as number {i}: {text!r}")
