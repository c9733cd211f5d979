"""Which of the weights a step reads."""

import math
from collections.abc import Iterator

import keras
import numpy as np

from keras_mamba2._compat.keras_layers import flatten_layers
from keras_mamba2.layers import MixtureOfExperts


def weights_read(backbone, num_tokens: int = 1) -> Iterator[tuple[keras.Variable, float]]:
    """Each weight of `backbone`, and the share of it that is read for so many tokens at once.

    Of experts those that the tokens take, on average if all are as likely.
    """
    shares = {
        id(weight): 1 - (1 - layer.num_experts_per_token / layer.num_experts) ** num_tokens
        for layer in flatten_layers(backbone)
        if isinstance(layer, MixtureOfExperts)
        for experts in (layer.experts_gate, layer.experts_up, layer.experts_down)
        if experts is not None
        for weight in experts.weights
    }
    return ((weight, shares.get(id(weight), 1.0)) for weight in backbone.weights)


def bytes_read(backbone, num_tokens: int = 1) -> float:
    """Of the weights, in a step of so many tokens."""
    return sum(
        share * math.prod(weight.shape) * np.dtype(weight.dtype).itemsize
        for weight, share in weights_read(backbone, num_tokens)
    )
