"""The sublayers of a hybrid with all of their arguments, also those that nobody wrote.

Two models are the same if these are: an option that one of them leaves out has its default.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import keras

from keras_mamba2.conversion.architectures.architecture import HYBRID
from keras_mamba2.conversion.architectures.values import limits

# What belongs to training, or to where a model runs. Files of transformers say nothing of it.
ELSEWHERE = {
    *("time_step_min", "time_step_max", "time_step_floor", "a_initializer_range"),
    *("num_residual_layers", "load_balancing_loss", "chunk_size"),
    *("state_dtype", "key_value_dtype"),
}
# The name of a sublayer -> its kind, as families here name them.
KINDS = {
    **{name: name for name in ("mamba2", "attention", "mlp")},
    "experts": "mixture_of_experts",
    "shared_expert": "mlp",
}


def completed(backbone_config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with all arguments of the sublayers that its blocks have."""
    names = {name for block in backbone_config["blocks"] for name in re.split("[+>]", block)}
    sublayers = {
        name: sublayer(arguments.get("kind", name), arguments, backbone_config)
        for name, arguments in backbone_config["sublayers"].items()
        if name in names
    }
    return {**backbone_config, "sublayers": sublayers}


def has_usual_kinds(backbone_config: Mapping[str, Any]) -> bool:
    """Whether the names of sublayers say what they are, as those of families here do."""
    return all(
        arguments["kind"] == _kind(name) for name, arguments in backbone_config["sublayers"].items()
    )


def sublayer(
    kind: str, arguments: Mapping[str, Any], backbone_config: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of a sublayer, each in one spelling."""
    multipliers = {"input_multiplier": 1.0, "output_multiplier": 1.0}
    epsilon = {}
    if kind in ("mamba2", "shared_transformer"):
        epsilon = {"layer_norm_epsilon": backbone_config["layer_norm_epsilon"]}
    values = {**multipliers, **_defaults(kind), **epsilon, **arguments, "kind": kind}
    if kind == "mamba2":
        values |= _mixer(values)
    elif kind == "attention":
        values |= _attention(values, backbone_config["hidden_dim"])
    elif kind == "shared_transformer":
        values |= {
            part: sublayer(part, values[part], backbone_config) for part in ("attention", "mlp")
        }
    return {key: value for key, value in values.items() if key not in ELSEWHERE}


def get(backbone_config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A sublayer. Where the model has none, one of one head: a family may ask for its sizes."""
    if name in backbone_config["sublayers"]:
        return backbone_config["sublayers"][name]
    d = backbone_config["hidden_dim"]
    attention = {"num_query_heads": 1, "num_key_value_heads": 1, "head_dim": d}
    sizes = {
        "mamba2": {"head_dim": 2 * d},
        "attention": attention,
        "shared_transformer": {
            "attention": attention,
            "mlp": {"intermediate_dim": d, "adapter_rank": 1},
        },
    }
    kind = _kind(name)
    return sublayer(kind, sizes[kind], backbone_config)


def _kind(name: str) -> str:
    return KINDS.get(name, "shared_transformer")


def _defaults(kind: str) -> dict[str, Any]:
    layer = keras.saving.get_registered_object(HYBRID).kinds[kind]
    parameters = inspect.signature(layer.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _mixer(values: Mapping[str, Any]) -> dict[str, Any]:
    output_bias = values["use_output_bias"]
    return {
        "use_output_bias": values["use_bias"] if output_bias is None else output_bias,
        "projection_multipliers": list(values["projection_multipliers"] or (1.0,) * 5),
        "time_step_limit": limits(values["time_step_limit"]),
    }


def _attention(values: Mapping[str, Any], hidden_dim: int) -> dict[str, Any]:
    scale, input_dim = values["scale"], values["input_dim"]
    return {
        "scale": values["head_dim"] ** -0.5 if scale is None else scale,
        "input_dim": hidden_dim if input_dim is None else input_dim,
    }
