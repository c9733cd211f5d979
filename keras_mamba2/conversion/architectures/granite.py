"""Granite 4.0 H of IBM: mixers or attention, each followed by an MLP, which may have experts."""

from collections.abc import Mapping
from typing import Any

from keras_mamba2.conversion import names
from keras_mamba2.conversion.architectures import shared_keys
from keras_mamba2.conversion.architectures import sublayers
from keras_mamba2.conversion.architectures.architecture import Architecture
from keras_mamba2.conversion.architectures.values import ATTENTION_LAYERS
from keras_mamba2.conversion.architectures.values import MAMBA_LAYERS
from keras_mamba2.conversion.architectures.values import check_length
from keras_mamba2.conversion.architectures.values import only
from keras_mamba2.conversion.architectures.values import required
from keras_mamba2.conversion.architectures.values import vocabulary
from keras_mamba2.conversion.architectures.values import whole

EXPERTS = "experts+mlp"


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    required(config, "hidden_size", "num_attention_heads")
    only(config, "hidden_act", "silu", "swish")
    kinds = config.get("layer_types") or config.get("layers_block_type")
    if kinds is None:
        required(config, "num_hidden_layers")
        kinds = ["mamba"] * config["num_hidden_layers"]
    check_length(config, "layer_types", len(kinds))
    experts = config.get("num_local_experts", 8) or 0
    feed_forward = EXPERTS if experts else "mlp"
    blocks = [name for kind in kinds for name in (_block(kind), feed_forward)]
    described: dict[str, dict[str, Any]] = {}
    if any(kind in MAMBA_LAYERS for kind in kinds):
        described["mamba2"] = shared_keys.mixer(config)
    if any(kind in ATTENTION_LAYERS for kind in kinds):
        described["attention"] = _attention(config)
    if experts:
        described["experts"] = {
            "kind": "mixture_of_experts",
            "intermediate_dim": config["intermediate_size"],
            "num_experts": experts,
            "num_experts_per_token": config.get("num_experts_per_tok", 2),
        }
    described["mlp"] = {"intermediate_dim": config["shared_intermediate_size"]}
    return {
        **vocabulary(config),
        "hidden_dim": config["hidden_size"],
        "blocks": blocks,
        "sublayers": described,
        "layer_norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "embedding_multiplier": config.get("embedding_multiplier", 1.0),
        "residual_multiplier": config.get("residual_multiplier", 1.0),
        "logits_multiplier": 1 / config.get("logits_scaling", 1.0),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


def _block(kind: str) -> str:
    if kind in MAMBA_LAYERS:
        return "mamba2"
    if kind in ATTENTION_LAYERS:
        return "attention"
    known = ", ".join(map(repr, (*MAMBA_LAYERS, *ATTENTION_LAYERS)))
    raise ValueError(f"Unknown kind of layer {kind!r}. Known: {known}")


def _attention(config: Mapping[str, Any]) -> dict[str, Any]:
    attention = shared_keys.attention(config)
    rotates = config.get("position_embedding_type") == "rope"
    return {
        **attention,
        "rotary_dim": attention["head_dim"] if rotates else 0,
        "scale": config.get("attention_multiplier", 1.0),
    }


def config(backbone_config: Mapping[str, Any]) -> dict[str, Any] | None:
    blocks, described = backbone_config["blocks"], backbone_config["sublayers"]
    if not shared_keys.alternate(blocks) or set(blocks[1::2]) not in ({"mlp"}, {EXPERTS}):
        return None
    kinds = {"mamba2": "mamba", "attention": "attention"}
    mixer = sublayers.get(backbone_config, "mamba2")
    attention = sublayers.get(backbone_config, "attention")
    shared_size = described["mlp"]["intermediate_dim"]
    experts = described.get("experts", {})
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        **shared_keys.written_outside(backbone_config),
        **shared_keys.written_attention(attention),
        **shared_keys.written_mixer(mixer, backbone_config["hidden_dim"]),
        "mamba_expand": mixer["expansion"],
        "num_hidden_layers": len(blocks) // 2,
        "layer_types": [kinds[name] for name in blocks[::2]],
        "intermediate_size": experts.get("intermediate_dim", shared_size),
        "shared_intermediate_size": shared_size,
        "num_local_experts": experts.get("num_experts", 0),
        "num_experts_per_tok": experts.get("num_experts_per_token", 0),
        "attention_multiplier": attention["scale"],
        "position_embedding_type": "rope" if attention["rotary_dim"] else "nope",
        "embedding_multiplier": backbone_config["embedding_multiplier"],
        "residual_multiplier": backbone_config["residual_multiplier"],
        "logits_scaling": _scaling(backbone_config["logits_multiplier"]),
    }


def _scaling(multiplier: float) -> float:
    """The divisor: 1 / (1 / 3) is a little less than 3."""
    return whole(round(1 / multiplier, 12))


def _feed_forward() -> dict[str, names.Weight]:
    rows = {"gate": 0, "up": 1}
    shared, experts = "shared_mlp", "block_sparse_moe"
    return {
        "norm/scale": names.Weight("post_attention_layernorm.weight"),
        **{
            f"mlp/{ours}/kernel": names.Weight(
                f"{shared}.input_linear.weight", names.LINEAR, part, (1, 1)
            )
            for ours, part in rows.items()
        },
        "mlp/down/kernel": names.Weight(f"{shared}.output_linear.weight", names.LINEAR),
        "experts/router": names.Weight(
            f"{experts}.router.layer.weight",
            names.LINEAR,
            parameter=f"{experts}.router.weight",
        ),
        **{
            f"experts/experts_{ours}/kernel": names.Weight(
                f"{experts}.input_linear.weight",
                names.LINEAR,
                part,
                (1, 1),
                f"{experts}.experts.gate_up_proj",
            )
            for ours, part in rows.items()
        },
        "experts/experts_down/kernel": names.Weight(
            f"{experts}.output_linear.weight",
            names.LINEAR,
            parameter=f"{experts}.experts.down_proj",
        ),
    }


GRANITE = Architecture(
    name="Granite 4.0 H",
    model_type="granitemoehybrid",
    arguments=arguments,
    names=names.Names(
        names.outside("model.embed_tokens.weight", "model.norm.weight"),
        "model.layers.{}.",
        [
            {
                "norm/scale": names.Weight("input_layernorm.weight"),
                **names.mixer("mamba2", "mamba"),
                **names.attention("attention", "self_attn"),
            },
            _feed_forward(),
        ],
    ),
    config=config,
)
