"""Values in a `config.json` that have more than one spelling, and checks of them."""

import math
from collections.abc import Mapping
from typing import Any

# Our own key: transformers counts padding rows as tokens.
UNPADDED_KEY = "unpadded_vocab_size"
# What transformers calls them, in the spelling of the hub's files and its own newer one.
MAMBA_LAYERS = ("mamba", "linear_attention", "mamba2")
ATTENTION_LAYERS = ("attention", "full_attention")


def limits(limit) -> tuple[float, float | None]:
    """`(low, high)`, with None for infinity, from any spelling that JSON files have."""
    if limit is None:
        return (0.0, None)
    numbers = [_number(value) for value in limit]
    if len(numbers) != 2 or any(map(math.isnan, numbers)):
        raise ValueError(f"`time_step_limit` must be a pair of numbers. Received: {limit}")
    low, high = numbers
    return (low, None if math.isinf(high) else high)


def written_limits(limit) -> list[float]:
    """`limits` reversed."""
    low, high = limit or (0.0, None)
    return [low, math.inf if high is None else high]


def written_least(limit) -> dict[str, Any]:
    """The lower limit, for families of which transformers 5 takes `time_step_min` for it.

    An upper one, which it does not have there, is left out, and so it is known to be lost.
    """
    low, high = limit
    # Without it transformers would take 0.001. It wants the logarithm, of a number above zero.
    least = {"time_step_min": max(low, 1e-30)}
    return least if high is not None else {"time_step_limit": written_limits(limit), **least}


def _number(value) -> float:
    if isinstance(value, Mapping):  # {"__float__": "Infinity"}
        value = value.get("__float__", "nan")
    return math.inf if value is None else float(value)


def whole(number: float) -> float:
    """As an int where it is one."""
    return int(number) if float(number).is_integer() else number


def required(config: Mapping[str, Any], *keys: str) -> None:
    """Raises for a key that the configuration does not have."""
    for key in keys:
        if config.get(key) is None:
            raise ValueError(f"The configuration has no `{key}`.")


def only(config: Mapping[str, Any], key: str, *values: Any) -> None:
    """Raises for a value of `key` that changes the architecture; the first is the default."""
    if config.get(key, values[0]) not in values:
        expected = " or ".join(map(repr, values))
        raise ValueError(f"`{key}` must be {expected}. Received: {config[key]!r}")


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of the rotation, but for its base, in the order of transformers."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def rope_theta(config: Mapping[str, Any], default: float = 10_000.0) -> float:
    """The base of the rotation, in any of its places."""
    parameters = rope_parameters(config)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", None):
        raise ValueError(f"`rope_type` must be 'default'. Received: {kind!r}")
    return parameters.get("rope_theta") or config.get("rope_theta") or default


def vocabulary(config: Mapping[str, Any]) -> dict[str, int]:
    required(config, "vocab_size")
    size = config["vocab_size"]
    # transformers keeps a key that it does not know, also where it makes a vocabulary smaller.
    return {
        "vocabulary_size": size,
        "unpadded_vocabulary_size": min(config.get(UNPADDED_KEY, size), size),
    }


def written_vocabulary(backbone_config: Mapping[str, Any]) -> dict[str, int]:
    """`vocabulary` reversed."""
    size, unpadded = (
        backbone_config[key] for key in ("vocabulary_size", "unpadded_vocabulary_size")
    )
    written = {} if unpadded in (None, size) else {UNPADDED_KEY: unpadded}
    return {"vocab_size": size, **written}


def check_length(config: Mapping[str, Any], key: str, length: int) -> None:
    """Raises if `num_hidden_layers` says something else than the list in `key`."""
    expected = config.get("num_hidden_layers", length)
    if expected != length:
        raise ValueError(
            f"`{key}` has {length} layers, but num_hidden_layers={expected}: they must agree."
        )
