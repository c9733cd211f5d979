"""How large a model is, from its constructor arguments alone."""

from collections.abc import Mapping
from typing import Any

# Recurrent states are float32 whatever the dtype; those of the convolutions have the model's.
STATE_BYTES = 4


def parameter_count(arguments: Mapping[str, Any]) -> int:
    """The number of weights of `Mamba2Backbone(**arguments)`, the head included."""
    v, d = arguments["vocabulary_size"], arguments["hidden_dim"]
    e, h, c = _inner_sizes(arguments)
    projected = e + c + h
    in_proj = d * projected + (projected if arguments.get("use_bias", False) else 0)
    out_proj = e * d + (d if arguments.get("use_bias", False) else 0)
    conv = c * (arguments.get("conv_kernel_size", 4) + arguments.get("use_conv_bias", True))
    norms, recurrence = d + e, 3 * h
    block = in_proj + conv + recurrence + out_proj + norms
    embeddings = v * d * (1 if arguments.get("tie_word_embeddings", True) else 2)
    return embeddings + arguments["num_layers"] * block + d


def state_bytes(arguments: Mapping[str, Any]) -> int:
    """The bytes of the state of one sequence, in float32."""
    e, _, c = _inner_sizes(arguments)
    conv = (arguments.get("conv_kernel_size", 4) - 1) * c
    return STATE_BYTES * arguments["num_layers"] * (conv + e * arguments.get("state_dim", 128))


def _inner_sizes(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """e, h, and the channels of the convolution, e + 2gn."""
    e = round(arguments.get("expansion", 2) * arguments["hidden_dim"])
    h = e // arguments.get("head_dim", 64)
    return e, h, e + 2 * arguments.get("num_groups", 1) * arguments.get("state_dim", 128)
