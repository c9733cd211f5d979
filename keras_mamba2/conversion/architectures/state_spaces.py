"""Mamba-2 of its authors, `mamba_ssm`: pure, or with attention in some layers."""

import math
from collections.abc import Mapping
from typing import Any

from keras_mamba2.conversion import names
from keras_mamba2.conversion.architectures.architecture import Architecture
from keras_mamba2.conversion.architectures.mamba2 import BLOCK
from keras_mamba2.conversion.architectures.values import limits
from keras_mamba2.conversion.architectures.values import required

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

# Options of `mamba_ssm` that change the architecture, and the values that are read.
SSM_FIXED = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "d_ssm": None}
FIXED = {"rms_norm": True, "d_intermediate": 0}
ATTENTION_FIXED = {
    "causal": True,
    "mlp_dim": 0,
    "rotary_emb_interleaved": False,
    "softmax_scale": None,
}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    ssm = config["ssm_cfg"]
    for options, fixed in ((ssm, SSM_FIXED), (config, FIXED)):
        _check_fixed(options, fixed)
    for key in ("d_model", "n_layer", "vocab_size"):
        if key not in config:
            raise ValueError(f"The configuration of a state-spaces checkpoint has no `{key}`.")
    multiple = config.get("pad_vocab_size_multiple", 8)  # the default of `mamba_ssm`
    common = {
        "vocabulary_size": -(-config["vocab_size"] // multiple) * multiple,
        "unpadded_vocabulary_size": config["vocab_size"],
        "hidden_dim": config["d_model"],
        "layer_norm_epsilon": config.get("norm_epsilon", 1e-5),
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
    }
    mixer = {
        **{argument: ssm.get(*key) for argument, key in SSM_KEYS.items()},
        "time_step_limit": limits(ssm.get("dt_limit", (0.0, math.inf))),
        "a_initializer_range": tuple(ssm.get("A_init_range", (1, 16))),
    }
    attends = config.get("attn_layer_idx")
    if not attends:
        return {**common, **mixer, "num_layers": config["n_layer"]}
    return {
        **common,
        "blocks": _blocks(config["n_layer"], attends),
        "sublayers": {"mamba2": mixer, "attention": _attention(config)},
    }


def _check_fixed(options: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for key, value in fixed.items():
        if options.get(key, value) != value:
            raise ValueError(f"`{key}` must be {value}. Received: {key}={options[key]}")


def _blocks(num_layers: int, attends: list[int]) -> list[str]:
    if outside := sorted(set(attends) - set(range(num_layers))):
        raise ValueError(f"`attn_layer_idx` has {outside[0]}, but n_layer={num_layers}.")
    return ["attention" if i in attends else "mamba2" for i in range(num_layers)]


def _attention(config: Mapping[str, Any]) -> dict[str, Any]:
    attention = config.get("attn_cfg") or {}
    _check_fixed(attention, ATTENTION_FIXED)
    required(attention, "num_heads")
    heads = attention["num_heads"]
    qkv_bias, out_bias = (attention.get(f"{part}_bias", True) for part in ("qkv_proj", "out_proj"))
    if qkv_bias != out_bias:
        raise ValueError(
            "Projections of attention have biases, or have none. Received: "
            f"qkv_proj_bias={qkv_bias}, out_proj_bias={out_bias}"
        )
    return {
        "num_query_heads": heads,
        "num_key_value_heads": attention.get("num_heads_kv") or heads,
        "head_dim": attention.get("head_dim") or config["d_model"] // heads,
        "rotary_dim": attention.get("rotary_emb_dim", 0),
        "rope_max_wavelength": attention.get("rotary_emb_base", 10_000.0),
        "use_bias": qkv_bias,
        "conv_kernel_size": attention.get("d_conv", 0),
    }


def weight_names(backbone_config: Mapping[str, Any]) -> names.Names:
    block = BLOCK
    if "blocks" in backbone_config:
        attention = _attention_names(backbone_config["sublayers"]["attention"])
        norm = {"norm/scale": names.Weight("norm.weight")}
        block = {**norm, **names.mixer("mamba2", "mixer"), **attention}
    outside = names.outside("backbone.embedding.weight", "backbone.norm_f.weight")
    return names.Names(outside, "backbone.layers.{}.", [block])


def _attention_names(attention: Mapping[str, Any]) -> dict[str, names.Weight]:
    """Queries, keys and values are one matrix."""
    keys = attention["num_key_value_heads"]
    parts = (attention["num_query_heads"], keys, keys)
    table = {
        "attention/conv_kernel": names.Weight("mixer.conv1d.weight", names.CONV),
        "attention/conv_bias": names.Weight("mixer.conv1d.bias"),
        **names.linear("attention/output", "mixer.out_proj"),
    }
    for i, part in enumerate(("query", "key", "value")):
        table[f"attention/{part}/kernel"] = names.Weight(
            "mixer.in_proj.weight", names.LINEAR, i, parts
        )
        table[f"attention/{part}/bias"] = names.Weight("mixer.in_proj.bias", names.SAME, i, parts)
    return table


STATE_SPACES = Architecture(
    name="state-spaces",
    model_type=None,
    arguments=arguments,
    names=weight_names,
)
