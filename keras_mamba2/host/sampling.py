"""Sampling parameters as arrays, one value per row, so that one program serves all values."""

from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import numpy as np

from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import number
from keras_mamba2.arguments import optional

# What each parameter may be.
KINDS = {
    "temperature": number(at_least=0),
    "top_k": optional(SIZE),
    "top_p": optional(number(above=0, at_most=1)),
    "min_p": optional(number(at_least=0, at_most=1)),
    "repetition_penalty": number(at_least=1),
}
# Of the likeliest token alone they leave what is. With the value that filters nothing.
FILTERS = {"top_k": None, "top_p": 1.0, "min_p": 0.0}
ALL = np.iinfo("int32").max  # a `top_k` that keeps every token


def with_given(parameters: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a sampler that is no `FilterSampler`, and those given for one call.

    Who asks a greedy sampler for a filter wants tokens to be drawn.
    """
    parameters = dict(parameters)
    filters = any(given.get(name) not in (None, value) for name, value in FILTERS.items())
    if parameters["temperature"] == 0 and filters:
        parameters["temperature"] = 1.0
    return {**parameters, **given}


class Sampling(NamedTuple):
    """The parameters of `FilterSampler` for each row, `(b)`."""

    temperature: Any  # float32; 0 takes the likeliest token
    top_k: Any  # int32; `ALL` keeps every token
    top_p: Any  # float32; 1 keeps every token
    min_p: Any  # float32; 0 keeps every token
    repetition_penalty: Any  # float32; 1 changes nothing

    @classmethod
    def of_rows(
        cls,
        batch_size: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
    ) -> "Sampling":
        """The same for every row."""
        return cls(
            np.full(batch_size, temperature, "float32"),
            np.full(batch_size, ALL if top_k is None else min(top_k, ALL), "int32"),
            np.full(batch_size, 1.0 if top_p is None else top_p, "float32"),
            np.full(batch_size, 0.0 if min_p is None else min_p, "float32"),
            np.full(batch_size, repetition_penalty, "float32"),
        )
