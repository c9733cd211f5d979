"""Nemotron-H and Nemotron 3 of NVIDIA: one mixer, attention, MLP or mixture of experts a layer."""

from collections.abc import Mapping
from typing import Any

from keras_mamba2.conversion import names
from keras_mamba2.conversion.architectures import sublayers
from keras_mamba2.conversion.architectures.architecture import Architecture
from keras_mamba2.conversion.architectures.values import ATTENTION_LAYERS
from keras_mamba2.conversion.architectures.values import MAMBA_LAYERS
from keras_mamba2.conversion.architectures.values import limits
from keras_mamba2.conversion.architectures.values import only
from keras_mamba2.conversion.architectures.values import required
from keras_mamba2.conversion.architectures.values import vocabulary
from keras_mamba2.conversion.architectures.values import whole
from keras_mamba2.conversion.architectures.values import written_least
from keras_mamba2.conversion.architectures.values import written_vocabulary

EXPERTS = "experts+shared_expert"
PATTERN = {"M": "mamba2", "*": "attention", "-": "mlp", "E": EXPERTS}
# transformers' words, in the files of the hub and in those that its version 5 writes.
KINDS = {
    **dict.fromkeys(MAMBA_LAYERS, "mamba2"),
    **dict.fromkeys(ATTENTION_LAYERS, "attention"),
    **dict.fromkeys(("mlp", "dense"), "mlp"),
    **dict.fromkeys(("moe", "experts", "sparse"), EXPERTS),
}
# Older names of keys, which transformers takes before the newer ones.
ALIASES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_limit": "time_step_limit",
    "num_local_experts": "n_routed_experts",
}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {**config, **{new: config[old] for old, new in ALIASES.items() if old in config}}
    required(config, "hidden_size", "num_attention_heads")
    only(config, "mlp_hidden_act", "relu2")
    only(config, "mamba_hidden_act", "silu", "swish")
    blocks = _blocks(config)
    makers = {
        "mamba2": _mixer,
        "attention": _attention,
        "mlp": _mlp,
        "experts": _experts,
        "shared_expert": _shared_expert,
    }
    used = {name for names in blocks for name in names.split("+")}
    return {
        **vocabulary(config),
        "hidden_dim": config["hidden_size"],
        "blocks": blocks,
        "sublayers": {name: make(config) for name, make in makers.items() if name in used},
        "layer_norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        # The weights of the head are always their own, whatever the configuration says.
        "tie_word_embeddings": False,
    }


def _blocks(config: Mapping[str, Any]) -> list[str]:
    kinds = config.get("layers_block_type") or config.get("layer_types")
    if kinds:
        for kind in kinds:
            if kind not in KINDS:
                known = ", ".join(map(repr, KINDS))
                raise ValueError(f"Unknown kind of layer {kind!r}. Known: {known}")
        return [KINDS[kind] for kind in kinds]
    pattern = config.get("hybrid_override_pattern")
    if not pattern:
        raise ValueError(
            "The configuration says nothing of its layers: neither `hybrid_override_pattern` nor "
            "`layers_block_type`."
        )
    if unknown := sorted(set(pattern) - set(PATTERN)):
        raise ValueError(
            f"`hybrid_override_pattern` has {unknown[0]!r}, which is none of "
            f"{', '.join(map(repr, PATTERN))}. Received: {pattern!r}"
        )
    return [PATTERN[letter] for letter in pattern]


def _mixer(config: Mapping[str, Any]) -> dict[str, Any]:
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    return {
        "state_dim": config.get("ssm_state_size", 128),
        "head_dim": config["mamba_head_dim"],
        "num_groups": config.get("n_groups", 8),
        "expansion": whole(inner / config["hidden_size"]),
        "conv_kernel_size": config.get("conv_kernel", 4),
        "use_bias": config.get("use_bias", False),
        "use_conv_bias": config.get("use_conv_bias", True),
        # The models were trained without limits. transformers 5 takes `time_step_min` for one, in
        # a part of its paths.
        "time_step_limit": limits(config.get("time_step_limit")),
    }


def _attention(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "num_query_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads", 8) or heads,
        "head_dim": config.get("head_dim") or config.get("attention_head_dim") or 128,
    }


def _mlp(config: Mapping[str, Any], size: str = "intermediate_size") -> dict[str, Any]:
    return {
        "kind": "mlp",
        "intermediate_dim": config[size],
        "activation": "squared_relu",
        "gated": False,
        "use_bias": config.get("mlp_bias", False),
    }


def _shared_expert(config: Mapping[str, Any]) -> dict[str, Any]:
    return _mlp(config, "moe_shared_expert_intermediate_size")


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": "mixture_of_experts",
        "intermediate_dim": config["moe_intermediate_size"],
        "num_experts": config["n_routed_experts"],
        "num_experts_per_token": config["num_experts_per_tok"],
        "activation": "squared_relu",
        "gated": False,
        "scoring": "sigmoid",
        "num_expert_groups": config.get("n_group", 1),
        "num_groups_per_token": config.get("topk_group", 1),
        "normalize_weights": config.get("norm_topk_prob", True),
        "weights_multiplier": config.get("routed_scaling_factor", 1.0),
        "latent_dim": config.get("moe_latent_size"),
        "use_bias": config.get("mlp_bias", False),
    }


def config(backbone_config: Mapping[str, Any]) -> dict[str, Any] | None:
    letters = {name: letter for letter, name in PATTERN.items()}
    blocks, described = backbone_config["blocks"], backbone_config["sublayers"]
    if not set(blocks) <= set(letters):
        return None
    mlp, experts = described.get("mlp"), described.get("experts")
    config = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        **written_vocabulary(backbone_config),
        "hidden_size": backbone_config["hidden_dim"],
        "num_hidden_layers": len(blocks),
        "hybrid_override_pattern": "".join(letters[name] for name in blocks),
        "layer_norm_epsilon": backbone_config["layer_norm_epsilon"],
        "tie_word_embeddings": False,
        "residual_in_fp32": backbone_config["residual_in_fp32"],
        "mlp_hidden_act": "relu2",
        "mlp_bias": (mlp or experts or {}).get("use_bias", False),
        **_written_attention(sublayers.get(backbone_config, "attention")),
        **_written_mixer(sublayers.get(backbone_config, "mamba2"), backbone_config["hidden_dim"]),
    }
    if mlp:
        config["intermediate_size"] = mlp["intermediate_dim"]
    if experts:
        config |= _written_experts(experts, described["shared_expert"])
    return config


def _written_attention(attention: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": attention["num_query_heads"],
        "num_key_value_heads": attention["num_key_value_heads"],
        "head_dim": attention["head_dim"],
    }


def _written_mixer(mixer: Mapping[str, Any], hidden_dim: int) -> dict[str, Any]:
    return {
        "mamba_num_heads": round(mixer["expansion"] * hidden_dim) // mixer["head_dim"],
        "mamba_head_dim": mixer["head_dim"],
        "ssm_state_size": mixer["state_dim"],
        "n_groups": mixer["num_groups"],
        "conv_kernel": mixer["conv_kernel_size"],
        "use_bias": mixer["use_bias"],
        "use_conv_bias": mixer["use_conv_bias"],
        **written_least(mixer["time_step_limit"]),
    }


def _written_experts(experts: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "n_routed_experts": experts["num_experts"],
        "num_experts_per_tok": experts["num_experts_per_token"],
        "moe_intermediate_size": experts["intermediate_dim"],
        "moe_shared_expert_intermediate_size": shared["intermediate_dim"],
        "n_group": experts["num_expert_groups"],
        "topk_group": min(experts["num_groups_per_token"], experts["num_expert_groups"]),
        "norm_topk_prob": experts["normalize_weights"],
        "routed_scaling_factor": experts["weights_multiplier"],
        "moe_latent_size": experts["latent_dim"],
    }


NEMOTRON_H = Architecture(
    name="Nemotron-H",
    model_type="nemotron_h",
    arguments=arguments,
    names=names.Names(
        names.outside("backbone.embeddings.weight", "backbone.norm_f.weight"),
        "backbone.layers.{}.",
        [
            {
                "norm/scale": names.Weight("norm.weight"),
                **names.mixer("mamba2", "mixer"),
                **names.attention("attention", "mixer"),
                **names.mlp("mlp", "mixer"),
                **names.mlp("shared_expert", "mixer.shared_experts"),
                "experts/router": names.Weight("mixer.gate.weight", names.LINEAR),
                "experts/router_bias": names.Weight("mixer.gate.e_score_correction_bias"),
                **{
                    f"experts/experts_{part}/kernel": names.Weight(
                        f"mixer.experts.{{expert}}.{part}_proj.weight",
                        names.LINEAR,
                        parameter=f"mixer.experts.{part}_proj",
                    )
                    for part in ("up", "down")
                },
                **names.linear("experts/latent_down", "mixer.fc1_latent_proj"),
                **names.linear("experts/latent_up", "mixer.fc2_latent_proj"),
            }
        ],
        ignored=r"mtp\..*",
        renamed=("backbone.", "model."),
    ),
    config=config,
)
