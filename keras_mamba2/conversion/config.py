"""The configuration of a checkpoint <-> the constructor arguments of `Mamba2Backbone`."""

import math
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from keras_mamba2.preset_files import CONFIG_FILE
from keras_mamba2.preset_files import read_json

TRANSFORMERS = "transformers"
STATE_SPACES = "state-spaces"
MAMBA_1 = ("mamba", "falcon_mamba", "Mamba1")

# What `transformers.Mamba2Config` takes for a key that `config.json` does not have.
TRANSFORMERS_DEFAULTS = {
    "num_heads": 128,
    "head_dim": 64,
    "vocab_size": 32768,
    "hidden_size": 4096,
    "state_size": 128,
    "num_hidden_layers": 64,
    "layer_norm_epsilon": 1e-5,
    "conv_kernel": 4,
    "n_groups": 8,
    "use_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": True,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "time_step_limit": (0.0, math.inf),
    "tie_word_embeddings": False,
}

# Constructor argument -> key of `Mamba2Config`, where the value is the same.
TRANSFORMERS_KEYS = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_dim": "hidden_size",
    "state_dim": "state_size",
    "head_dim": "head_dim",
    "num_groups": "n_groups",
    "conv_kernel_size": "conv_kernel",
    "use_bias": "use_bias",
    "use_conv_bias": "use_conv_bias",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "time_step_min": "time_step_min",
    "time_step_max": "time_step_max",
    "time_step_floor": "time_step_floor",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_word_embeddings",
}

# Our own key: transformers counts padding rows as tokens.
UNPADDED_KEY = "unpadded_vocab_size"

# Constructor argument -> key of `ssm_cfg`, and what `mamba_ssm.Mamba2` takes without it.
SSM_KEYS = {
    "state_dim": ("d_state", 128),
    "head_dim": ("headdim", 64),
    "num_groups": ("ngroups", 1),
    "expansion": ("expand", 2),
    "conv_kernel_size": ("d_conv", 4),
    "use_bias": ("bias", False),
    "use_conv_bias": ("conv_bias", True),
    "time_step_min": ("dt_min", 0.001),
    "time_step_max": ("dt_max", 0.1),
    "time_step_floor": ("dt_init_floor", 1e-4),
}

# Options of `mamba_ssm` that change the architecture, and the one value that is Mamba-2's.
SSM_FIXED = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "d_ssm": None}
STATE_SPACES_FIXED = {"rms_norm": True, "d_intermediate": 0}


def format_of(config: Mapping[str, Any]) -> str:
    """Tells whose `config.json` this is.

    Returns:
        `"transformers"` or `"state-spaces"`.

    Raises:
        ValueError: for Mamba-1, a hybrid with attention layers, another model type, and a
            configuration without any key of the two formats.
    """
    attention = attention_layers(config)
    if attention:
        raise ValueError(
            "The checkpoint is a hybrid with attention, which is not supported yet. "
            f"Attention layers: {', '.join(map(str, attention))}"
        )
    if "hidden_size" not in config and ("ssm_cfg" in config or "n_layer" in config):
        # The reference takes Mamba-1 where the configuration names no layer.
        layer = (config.get("ssm_cfg") or {}).get("layer", "Mamba1")
        if layer != "Mamba2":
            _refuse("ssm_cfg.layer", layer, "Mamba2")
        return STATE_SPACES
    if "model_type" not in config:
        raise ValueError(
            "The configuration has neither `model_type` (transformers) nor `ssm_cfg` "
            f"(state-spaces). Received keys: {', '.join(sorted(config)) or 'none'}"
        )
    if config["model_type"] != "mamba2":
        _refuse("model_type", config["model_type"], "mamba2")
    return TRANSFORMERS


def _refuse(key: str, value: Any, expected: str):
    if value in MAMBA_1:
        raise ValueError(
            f"The checkpoint is a Mamba-1 model, not a Mamba-2 model: another architecture, "
            f"which is not supported. Received: {key}={value!r} (the default without the key)"
        )
    raise ValueError(f"Unknown `{key}`. Expected: {expected!r}. Received: {value!r}")


def attention_layers(config: Mapping[str, Any]) -> list[int]:
    """The indices of the attention layers, in any of the spellings of hybrid models."""
    for key in ("attn_layer_idx", "attn_layer_indices", "attention_layers_idx"):
        if config.get(key):
            return sorted(config[key])
    kinds = config.get("layers_block_type") or config.get("layer_types")
    if kinds is None:
        kinds = ["attention" * (c == "*") for c in config.get("hybrid_override_pattern") or ""]
    # `linear_attention` is transformers' word for a recurrent layer.
    return [i for i, kind in enumerate(kinds) if kind != "linear_attention" and _attends(kind)]


def _attends(kind: str) -> bool:
    return "attention" in kind or kind == "hybrid"


def constructor_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Mamba2Backbone` for a `config.json` in either format.

    `vocabulary_size` counts the padding rows of the embedding, as the tensors do. `chunk_size`
    is not taken over: it does not belong to a model but to the machine that it runs on.

    Raises:
        ValueError: as `format_of`, and for an option that changes the architecture.
    """
    if format_of(config) == TRANSFORMERS:
        return _from_transformers(config)
    return _from_state_spaces(config)


def read_constructor_arguments(folder) -> dict[str, Any]:
    """`constructor_arguments` of the `config.json` in `folder`. Errors name the file."""
    file = pathlib.Path(folder) / CONFIG_FILE
    config = read_json(file)
    try:
        return constructor_arguments(config)
    # A value of a wrong type can fail anywhere.
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _from_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"`hidden_act` must be 'silu'. Received: {config['hidden_act']!r}")
    config = {**TRANSFORMERS_DEFAULTS, **config}
    arguments = {argument: config[key] for argument, key in TRANSFORMERS_KEYS.items()}
    # `expand` is not read: in some exports it disagrees with the heads, which fit the tensors.
    expansion = config["num_heads"] * config["head_dim"] / config["hidden_size"]
    arguments["expansion"] = int(expansion) if expansion.is_integer() else expansion
    arguments["time_step_limit"] = _limits(config["time_step_limit"])
    arguments["unpadded_vocabulary_size"] = config.get(UNPADDED_KEY, config["vocab_size"])
    return arguments


def _from_state_spaces(config: Mapping[str, Any]) -> dict[str, Any]:
    ssm = config["ssm_cfg"]
    for options, fixed in ((ssm, SSM_FIXED), (config, STATE_SPACES_FIXED)):
        for key, value in fixed.items():
            if options.get(key, value) != value:
                raise ValueError(f"`{key}` must be {value}. Received: {key}={options[key]}")
    for key in ("d_model", "n_layer", "vocab_size"):
        if key not in config:
            raise ValueError(f"The configuration of a state-spaces checkpoint has no `{key}`.")
    multiple = config.get("pad_vocab_size_multiple", 8)  # the default of `mamba_ssm`
    arguments = {argument: ssm.get(*key) for argument, key in SSM_KEYS.items()}
    arguments.update(
        {
            "vocabulary_size": -(-config["vocab_size"] // multiple) * multiple,
            "unpadded_vocabulary_size": config["vocab_size"],
            "num_layers": config["n_layer"],
            "hidden_dim": config["d_model"],
            "layer_norm_epsilon": config.get("norm_epsilon", 1e-5),
            "time_step_limit": _limits(ssm.get("dt_limit", (0.0, math.inf))),
            "a_initializer_range": tuple(ssm.get("A_init_range", (1, 16))),
            "residual_in_fp32": config.get("residual_in_fp32", True),
            "tie_word_embeddings": config.get("tie_embeddings", True),
        }
    )
    return arguments


def _limits(limit) -> tuple[float, float | None]:
    """`(low, high)`, with None for infinity, from any spelling that JSON files have."""
    if limit is None:
        return (0.0, None)
    numbers = [_number(value) for value in limit]
    if len(numbers) != 2 or any(map(math.isnan, numbers)):
        raise ValueError(f"`time_step_limit` must be a pair of numbers. Received: {limit}")
    low, high = numbers
    return (low, None if math.isinf(high) else high)


def _number(value) -> float:
    if isinstance(value, Mapping):  # {"__float__": "Infinity"}
        value = value.get("__float__", "nan")
    return math.inf if value is None else float(value)


def transformers_config(
    backbone_config: Mapping[str, Any],
    dtype: str = "float32",
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The `config.json` with which transformers builds a model: `constructor_arguments` reversed.

    Args:
        backbone_config: `Mamba2Backbone.get_config()`.
        dtype: string, the dtype that transformers loads the weights in.
        bos_token_id: int, or `None` if there is none.
        eos_token_id: int, or `None` if there is none.
        pad_token_id: int, or `None` if there is none.
    """
    expansion, hidden_dim = backbone_config["expansion"], backbone_config["hidden_dim"]
    if expansion != int(expansion):
        warnings.warn(
            f"expansion={expansion} is not a whole number: transformers from version 5 on refuses "
            "the exported model, older versions load it.",
            stacklevel=3,
        )
    config = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **{key: backbone_config[argument] for argument, key in TRANSFORMERS_KEYS.items()},
        "expand": int(expansion) if expansion == int(expansion) else expansion,
        "num_heads": round(expansion * hidden_dim) // backbone_config["head_dim"],
        "hidden_act": "silu",
        "chunk_size": 256,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,  # the same to transformers before 4.56
    }
    unpadded = backbone_config["unpadded_vocabulary_size"]
    if unpadded not in (None, backbone_config["vocabulary_size"]):
        config[UNPADDED_KEY] = unpadded
    low, high = backbone_config["time_step_limit"] or (0.0, None)
    if low > 0 or high is not None:  # left out when it is the default: JSON has no infinity
        config["time_step_limit"] = [low, math.inf if high is None else high]
    return config
