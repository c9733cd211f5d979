"""Bamba of IBM: mixers or attention, each followed by an MLP."""

from collections.abc import Mapping
from typing import Any

from keras_mamba2.conversion import names
from keras_mamba2.conversion.architectures import shared_keys
from keras_mamba2.conversion.architectures import sublayers
from keras_mamba2.conversion.architectures.architecture import Architecture
from keras_mamba2.conversion.architectures.values import only
from keras_mamba2.conversion.architectures.values import required
from keras_mamba2.conversion.architectures.values import rope_parameters
from keras_mamba2.conversion.architectures.values import vocabulary

# The share of a head that is rotated. transformers does not read `partial_rotary_factor` outside
# `rope_parameters`, which its version 4 does not read either: no other share can be written.
ROTATED = 0.5


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
    makers = {"mamba2": shared_keys.mixer, "attention": _attention}
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


def _attention(config: Mapping[str, Any]) -> dict[str, Any]:
    attention = shared_keys.attention(config, key_value_heads=8)
    partial = rope_parameters(config).get("partial_rotary_factor", ROTATED)
    return {**attention, "rotary_dim": int(attention["head_dim"] * partial)}


def config(backbone_config: Mapping[str, Any]) -> dict[str, Any] | None:
    blocks = backbone_config["blocks"]
    if not shared_keys.alternate(blocks) or set(blocks[1::2]) != {"mlp"}:
        return None
    mixer, mlp = sublayers.get(backbone_config, "mamba2"), backbone_config["sublayers"]["mlp"]
    return {
        "architectures": ["BambaForCausalLM"],
        "model_type": "bamba",
        **shared_keys.written_outside(backbone_config),
        **shared_keys.written_attention(sublayers.get(backbone_config, "attention")),
        **shared_keys.written_mixer(mixer, backbone_config["hidden_dim"]),
        "mamba_expand": mixer["expansion"],
        "num_hidden_layers": len(blocks) // 2,
        "attn_layer_indices": [i for i, name in enumerate(blocks[::2]) if name == "attention"],
        "partial_rotary_factor": ROTATED,
        "intermediate_size": mlp["intermediate_dim"],
        "mlp_bias": mlp["use_bias"],
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
