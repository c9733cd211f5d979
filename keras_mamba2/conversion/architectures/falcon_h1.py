"""Falcon-H1 of TII: a mixer and attention in parallel, then an MLP, in every layer."""

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
    d, heads = config["hidden_size"], config.get("mamba_n_heads", 128)
    inner = config.get("mamba_d_ssm")
    inner = config.get("mamba_expand", 2) * d if inner is None else inner
    head_dim = config.get("mamba_d_head", "auto")
    head_dim = inner // heads if head_dim == "auto" else head_dim
    if heads * head_dim != inner:
        raise ValueError(
            "mamba_n_heads * mamba_d_head must be mamba_d_ssm. Received: "
            f"{heads} * {head_dim} and {inner}"
        )
    normalized = config.get("mamba_rms_norm", False), config.get("mamba_norm_before_gate", True)
    return {
        "state_dim": config.get("mamba_d_state", 256),
        "head_dim": head_dim,
        "num_groups": config.get("mamba_n_groups", 1),
        "expansion": whole(inner / d),
        "conv_kernel_size": config.get("mamba_d_conv", 4),
        "use_bias": config.get("mamba_proj_bias", False),
        "use_output_bias": config.get("projectors_bias", False),
        "use_conv_bias": config.get("mamba_conv_bias", True),
        "gated_norm": GATED_NORMS[normalized],
        "projection_multipliers": list(config.get("ssm_multipliers") or ONES),
        "time_step_limit": limits(config.get("time_step_limit")),
        "input_multiplier": config.get("ssm_in_multiplier", 1.0),
        "output_multiplier": config.get("ssm_out_multiplier", 1.0),
    }


def _attention(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "num_query_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "rotary_dim": head_dim,
        "rope_max_wavelength": rope_theta(config),
        "key_multiplier": config.get("key_multiplier") or 1.0,
        "use_bias": config.get("attention_bias", False),
        "input_multiplier": config.get("attention_in_multiplier", 1.0),
        "output_multiplier": config.get("attention_out_multiplier", 1.0),
    }


def config(backbone_config: Mapping[str, Any]) -> dict[str, Any] | None:
    blocks, sublayers = backbone_config["blocks"], backbone_config["sublayers"]
    if blocks != BLOCKS * (len(blocks) // 2):
        return None
    d = backbone_config["hidden_dim"]
    mixer, attention, mlp = (sublayers[name] for name in ("mamba2", "attention", "mlp"))
    inner = round(mixer.get("expansion", 2) * d)
    gated_norm = mixer.get("gated_norm", "after_gate")
    return {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "vocab_size": backbone_config["vocabulary_size"],
        UNPADDED_KEY: backbone_config["unpadded_vocabulary_size"],
        "hidden_size": d,
        "num_hidden_layers": len(blocks) // 2,
        "intermediate_size": mlp["intermediate_dim"],
        "hidden_act": "silu",
        "mlp_bias": mlp.get("use_bias", False),
        "mlp_multipliers": [mlp.get("gate_multiplier", 1.0), mlp.get("output_multiplier", 1.0)],
        "num_attention_heads": attention["num_query_heads"],
        "num_key_value_heads": attention["num_key_value_heads"],
        "head_dim": attention["head_dim"],
        "rope_theta": attention.get("rope_max_wavelength", 10_000.0),
        "attention_bias": attention.get("use_bias", False),
        "key_multiplier": attention.get("key_multiplier", 1.0),
        "attention_in_multiplier": attention.get("input_multiplier", 1.0),
        "attention_out_multiplier": attention.get("output_multiplier", 1.0),
        "mamba_d_ssm": inner,
        "mamba_n_heads": inner // mixer["head_dim"],
        "mamba_d_head": mixer["head_dim"],
        "mamba_n_groups": mixer.get("num_groups", 1),
        "mamba_d_state": mixer["state_dim"],
        "mamba_d_conv": mixer.get("conv_kernel_size", 4),
        "mamba_conv_bias": mixer.get("use_conv_bias", True),
        "mamba_proj_bias": mixer.get("use_bias", False),
        "projectors_bias": mixer.get("use_output_bias", False),
        "mamba_rms_norm": gated_norm != "none",
        "mamba_norm_before_gate": gated_norm == "before_gate",
        "ssm_multipliers": list(mixer.get("projection_multipliers") or ONES),
        "ssm_in_multiplier": mixer.get("input_multiplier", 1.0),
        "ssm_out_multiplier": mixer.get("output_multiplier", 1.0),
        "time_step_limit": written_limits(mixer.get("time_step_limit")),
        "embedding_multiplier": backbone_config["embedding_multiplier"],
        "lm_head_multiplier": backbone_config["logits_multiplier"],
        "rms_norm_eps": backbone_config["layer_norm_epsilon"],
        "tie_word_embeddings": backbone_config["tie_word_embeddings"],
    }


FALCON_H1 = Architecture(
    name="Falcon-H1",
    model_type="falcon_h1",
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
