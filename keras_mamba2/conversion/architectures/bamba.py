"""Bamba of IBM: mixers or attention, each followed by an MLP."""

from collections.abc import Mapping
from typing import Any

from keras_mamba2.conversion import names
from keras_mamba2.conversion.architectures.architecture import Architecture
from keras_mamba2.conversion.architectures.values import UNPADDED_KEY
from keras_mamba2.conversion.architectures.values import limits
from keras_mamba2.conversion.architectures.values import only
from keras_mamba2.conversion.architectures.values import required
from keras_mamba2.conversion.architectures.values import rope_theta
from keras_mamba2.conversion.architectures.values import vocabulary
from keras_mamba2.conversion.architectures.values import whole
from keras_mamba2.conversion.architectures.values import written_limits


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    required(config, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    only(config, "hidden_act", "silu", "swish")
    num_layers = config["num_hidden_layers"]
    attends = set(config.get("attn_layer_indices") or ())
    if outside := sorted(attends - set(range(num_layers))):
        raise ValueError(
            f"`attn_layer_indices` has {outside[0]}, but num_hidden_layers={num_layers}."
        )
    blocks = ["attention" if i in attends else "mamba2" for i in range(num_layers)]
    makers = {"mamba2": _mixer, "attention": _attention}
    return {
        **vocabulary(config),
        "hidden_dim": config["hidden_size"],
        "blocks": [name for block in blocks for name in (block, "mlp")],
        "sublayers": {
            **{name: make(config) for name, make in makers.items() if name in blocks},
            "mlp": {
                "intermediate_dim": config["intermediate_size"],
                "use_bias": config.get("mlp_bias", False),
            },
        },
        "layer_norm_epsilon": config.get("rms_norm_eps", 1e-5),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


def _mixer(config: Mapping[str, Any]) -> dict[str, Any]:
    d, heads = config["hidden_size"], config.get("mamba_n_heads", 128)
    inner = config.get("mamba_expand", 2) * d
    head_dim = config.get("mamba_d_head", "auto")
    head_dim = inner // heads if head_dim == "auto" else head_dim
    if heads * head_dim != inner:
        raise ValueError(
            "mamba_n_heads * mamba_d_head must be mamba_expand * hidden_size. Received: "
            f"{heads} * {head_dim} and {inner}"
        )
    return {
        "state_dim": config.get("mamba_d_state", 256),
        "head_dim": head_dim,
        "num_groups": config.get("mamba_n_groups", 1),
        "expansion": whole(inner / d),
        "conv_kernel_size": config.get("mamba_d_conv", 4),
        "use_bias": config.get("mamba_proj_bias", False),
        "use_conv_bias": config.get("mamba_conv_bias", True),
        "time_step_limit": limits(config.get("time_step_limit")),
    }


def _attention(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    head_dim = config["hidden_size"] // heads
    parameters = config.get("rope_parameters") or {}
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    return {
        "num_query_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "rotary_dim": int(head_dim * partial),
        "rope_max_wavelength": rope_theta(config),
        "use_bias": config.get("attention_bias", False),
    }


def config(backbone_config: Mapping[str, Any]) -> dict[str, Any] | None:
    blocks, sublayers = backbone_config["blocks"], backbone_config["sublayers"]
    mixer, attention = sublayers.get("mamba2"), sublayers.get("attention")
    if mixer is None or attention is None or set(blocks[1::2]) != {"mlp"}:
        return None
    d = backbone_config["hidden_dim"]
    return {
        "architectures": ["BambaForCausalLM"],
        "model_type": "bamba",
        "vocab_size": backbone_config["vocabulary_size"],
        UNPADDED_KEY: backbone_config["unpadded_vocabulary_size"],
        "hidden_size": d,
        "num_hidden_layers": len(blocks) // 2,
        "attn_layer_indices": [i for i, name in enumerate(blocks[::2]) if name == "attention"],
        "intermediate_size": sublayers["mlp"]["intermediate_dim"],
        "mlp_bias": sublayers["mlp"].get("use_bias", False),
        "hidden_act": "silu",
        "num_attention_heads": attention["num_query_heads"],
        "num_key_value_heads": attention["num_key_value_heads"],
        "attention_bias": attention.get("use_bias", False),
        "partial_rotary_factor": attention.get("rotary_dim", 0) / attention["head_dim"],
        "rope_theta": attention.get("rope_max_wavelength", 10_000.0),
        "mamba_n_heads": round(mixer.get("expansion", 2) * d) // mixer["head_dim"],
        "mamba_d_head": mixer["head_dim"],
        "mamba_n_groups": mixer.get("num_groups", 1),
        "mamba_d_state": mixer["state_dim"],
        "mamba_d_conv": mixer.get("conv_kernel_size", 4),
        "mamba_expand": mixer.get("expansion", 2),
        "mamba_conv_bias": mixer.get("use_conv_bias", True),
        "mamba_proj_bias": mixer.get("use_bias", False),
        "time_step_limit": written_limits(mixer.get("time_step_limit")),
        "rms_norm_eps": backbone_config["layer_norm_epsilon"],
        "tie_word_embeddings": backbone_config["tie_word_embeddings"],
    }


BAMBA = Architecture(
    name="Bamba",
    model_type="bamba",
    arguments=arguments,
    names=names.Names(
        names.outside("model.embed_tokens.weight", "model.final_layernorm.weight"),
        "model.layers.{}.",
        [
            {
                "norm/scale": names.Weight("input_layernorm.weight"),
                **names.mixer("mamba2", "mamba"),
                **names.attention("attention", "self_attn"),
            },
            {
                "norm/scale": names.Weight("pre_ff_layernorm.weight"),
                **names.mlp("mlp", "feed_forward"),
            },
        ],
    ),
    config=config,
)
