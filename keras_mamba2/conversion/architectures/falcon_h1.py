"""Falcon-H1 of TII: a mixer and attention in parallel, then an MLP, in every layer."""

from collections.abc import Mapping
from typing import Any

from keras_mamba2.conversion.architectures import shared_keys
from keras_mamba2.conversion.architectures.architecture import Architecture
from keras_mamba2.conversion.architectures.bamba import BAMBA
from keras_mamba2.conversion.architectures.values import only
from keras_mamba2.conversion.architectures.values import required
from keras_mamba2.conversion.architectures.values import vocabulary

BLOCKS = ["mamba2+attention", "mlp"]
ONES = (1.0,) * 5
# Whether the file has a gated norm, and whether its norm comes first -> `gated_norm`.
GATED_NORMS = {
    (False, True): "none",
    (False, False): "none",
    (True, False): "after_gate",
    (True, True): "before_gate",
}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    required(config, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    only(config, "hidden_act", "silu", "swish")
    gate, down = config.get("mlp_multipliers") or (1.0, 1.0)
    return {
        **vocabulary(config),
        "hidden_dim": config["hidden_size"],
        "blocks": BLOCKS * config["num_hidden_layers"],
        "sublayers": {
            "mamba2": _mixer(config),
            "attention": _attention(config),
            "mlp": {
                "intermediate_dim": config["intermediate_size"],
                "gate_multiplier": gate,
                "output_multiplier": down,
                "use_bias": config.get("mlp_bias", False),
            },
        },
        "layer_norm_epsilon": config.get("rms_norm_eps", 1e-5),
        "embedding_multiplier": config.get("embedding_multiplier", 1.0),
        "logits_multiplier": config.get("lm_head_multiplier", 1.0),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


def _mixer(config: Mapping[str, Any]) -> dict[str, Any]:
    normalized = config.get("mamba_rms_norm", False), config.get("mamba_norm_before_gate", True)
    return {
        **shared_keys.mixer(config, config.get("mamba_d_ssm", 1024)),
        "use_output_bias": config.get("projectors_bias", False),
        "gated_norm": GATED_NORMS[normalized],
        "projection_multipliers": list(config.get("ssm_multipliers") or ONES),
        "input_multiplier": config.get("ssm_in_multiplier", 1.0),
        "output_multiplier": config.get("ssm_out_multiplier", 1.0),
    }


def _attention(config: Mapping[str, Any]) -> dict[str, Any]:
    attention = shared_keys.attention(config, key_value_heads=8)
    return {
        **attention,
        "rotary_dim": attention["head_dim"],
        "key_multiplier": config.get("key_multiplier") or 1.0,
        "input_multiplier": config.get("attention_in_multiplier", 1.0),
        "output_multiplier": config.get("attention_out_multiplier", 1.0),
    }


def config(backbone_config: Mapping[str, Any]) -> dict[str, Any] | None:
    blocks, sublayers = backbone_config["blocks"], backbone_config["sublayers"]
    if blocks != BLOCKS * (len(blocks) // 2):
        return None
    d = backbone_config["hidden_dim"]
    mixer, attention, mlp = (sublayers[name] for name in ("mamba2", "attention", "mlp"))
    gated_norm = mixer["gated_norm"]
    return {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        **shared_keys.written_outside(backbone_config),
        **shared_keys.written_attention(attention),
        **shared_keys.written_mixer(mixer, d),
        "num_hidden_layers": len(blocks) // 2,
        "intermediate_size": mlp["intermediate_dim"],
        "mlp_bias": mlp["use_bias"],
        # As floats, which transformers wants of them.
        "mlp_multipliers": [float(mlp["gate_multiplier"]), float(mlp["output_multiplier"])],
        "key_multiplier": float(attention["key_multiplier"]),
        "attention_in_multiplier": float(attention["input_multiplier"]),
        "attention_out_multiplier": float(attention["output_multiplier"]),
        "mamba_d_ssm": round(mixer["expansion"] * d),
        "projectors_bias": mixer["use_output_bias"],
        "mamba_rms_norm": gated_norm != "none",
        "mamba_norm_before_gate": gated_norm == "before_gate",
        "ssm_multipliers": list(map(float, mixer["projection_multipliers"])),
        "ssm_in_multiplier": float(mixer["input_multiplier"]),
        "ssm_out_multiplier": float(mixer["output_multiplier"]),
        "embedding_multiplier": float(backbone_config["embedding_multiplier"]),
        "lm_head_multiplier": float(backbone_config["logits_multiplier"]),
    }


FALCON_H1 = Architecture(
    name="Falcon-H1",
    model_type="falcon_h1",
    arguments=arguments,
    names=BAMBA.names,  # the same names for the same parts
    config=config,
)
