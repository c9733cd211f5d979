"""The names of a model's inputs."""

from collections.abc import Mapping
from typing import Any

# What transformers calls them.
ALIASES = {"input_ids": "token_ids", "attention_mask": "padding_mask"}
NAMES = ("token_ids", "padding_mask", "segment_ids")


def standard_names(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` under KerasHub's names: `token_ids`, `padding_mask`, maybe `segment_ids`.

    Raises:
        ValueError: for a name that no model takes, two names of one input, and what is missing.
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(
            "Inputs must be a dict of `token_ids` and `padding_mask`. "
            f"Received: {type(inputs).__name__}"
        )
    named = {ALIASES.get(name, name): value for name, value in inputs.items()}
    received = ", ".join(map(repr, inputs))
    if len(named) < len(inputs):
        raise ValueError(f"An input is named twice. Received: {received}")
    if unknown := [name for name in named if name not in NAMES]:
        raise ValueError(
            f"There is no input {unknown[0]!r}. A model takes `token_ids` and `padding_mask`, or "
            f"as transformers calls them {' and '.join(map(repr, ALIASES))}, and `segment_ids` for "
            f"documents that share a row. Received: {received}"
        )
    for name in NAMES[:2]:
        if name not in named:
            raise ValueError(f"The input `{name}` is missing. Received: {received}")
    return named


def names_of_texts(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """As `standard_names`, of rows that are one text each.

    Raises:
        ValueError: as there, and for `segment_ids`.
    """
    named = standard_names(inputs)
    if "segment_ids" in named:
        raise ValueError(
            "A row is one text here, and takes no `segment_ids`. Pass documents that share a row "
            "as rows of their own."
        )
    return named
