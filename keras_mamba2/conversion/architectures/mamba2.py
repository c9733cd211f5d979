"""Pure Mamba-2 of transformers."""

import math
from collections.abc import Mapping
from typing import Any

from keras_mamba2.conversion import names
from keras_mamba2.conversion.architectures.architecture import Architecture
from keras_mamba2.conversion.architectures.values import limits
from keras_mamba2.conversion.architectures.values import only
from keras_mamba2.conversion.architectures.values import vocabulary
from keras_mamba2.conversion.architectures.values import whole
from keras_mamba2.conversion.architectures.values import written_limits
from keras_mamba2.conversion.architectures.values import written_vocabulary

# What `transformers.Mamba2Config` takes for a key that `config.json` does not have.
DEFAULTS = {
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

# Names of flash-linear-attention, whose files are the same otherwise.
ALIASES = {"norm_eps": "layer_norm_epsilon", "dt_limit": "time_step_limit"}

# Constructor argument -> key of `Mamba2Config`, where the value is the same.
KEYS = {
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


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    only(config, "hidden_act", "silu", "swish")
    aliased = {new: config[old] for old, new in ALIASES.items() if old in config}
    config = {**DEFAULTS, **aliased, **config}
    arguments = {argument: config[key] for argument, key in KEYS.items()}
    # `expand` is not read: in some exports it disagrees with the heads, which fit the tensors.
    arguments["expansion"] = whole(config["num_heads"] * config["head_dim"] / config["hidden_size"])
    arguments["time_step_limit"] = limits(config["time_step_limit"])
    return {**vocabulary(config), **arguments}


def config(backbone_config: Mapping[str, Any]) -> dict[str, Any]:
    expansion, hidden_dim = backbone_config["expansion"], backbone_config["hidden_dim"]
    config = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **written_vocabulary(backbone_config),
        **{key: backbone_config[argument] for argument, key in KEYS.items()},
        "expand": whole(expansion),
        "num_heads": round(expansion * hidden_dim) // backbone_config["head_dim"],
        "hidden_act": "silu",
        "chunk_size": 256,
    }
    written = written_limits(backbone_config["time_step_limit"])
    if written != [0.0, math.inf]:  # left out when it is the default: JSON has no infinity
        config["time_step_limit"] = written
    return config


BLOCK = {"norm/scale": names.Weight("norm.weight"), **names.mixer("mixer", "mixer")}

MAMBA2 = Architecture(
    name="transformers",
    model_type="mamba2",
    arguments=arguments,
    names=names.Names(
        names.outside("backbone.embeddings.weight", "backbone.norm_f.weight"),
        "backbone.layers.{}.",
        [BLOCK],
    ),
    config=config,
)
