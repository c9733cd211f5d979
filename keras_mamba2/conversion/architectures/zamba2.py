"""Zamba2 of Zyphra: mixers, some of which see what a transformer block makes that they share."""

import re
from collections.abc import Mapping
from typing import Any

from keras_mamba2.conversion import names
from keras_mamba2.conversion.architectures import sublayers
from keras_mamba2.conversion.architectures.architecture import Architecture
from keras_mamba2.conversion.architectures.values import MAMBA_LAYERS
from keras_mamba2.conversion.architectures.values import check_length
from keras_mamba2.conversion.architectures.values import limits
from keras_mamba2.conversion.architectures.values import only
from keras_mamba2.conversion.architectures.values import required
from keras_mamba2.conversion.architectures.values import rope_theta
from keras_mamba2.conversion.architectures.values import vocabulary
from keras_mamba2.conversion.architectures.values import whole
from keras_mamba2.conversion.architectures.values import written_least
from keras_mamba2.conversion.architectures.values import written_vocabulary

# Other names of keys.
ALIASES = {"layer_types": "layers_block_type"}
EPSILON = 1e-5  # of the gated norm, whatever the configuration says


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {**{new: config[old] for old, new in ALIASES.items() if old in config}, **config}
    required(config, "hidden_size", "num_attention_heads", "layers_block_type", "n_mamba_heads")
    only(config, "hidden_act", "gelu")
    # It stretches the rotation.
    only(config, "use_long_context", False)
    kinds = config["layers_block_type"]
    check_length(config, "layers_block_type", len(kinds))
    num_blocks = config.get("num_mem_blocks", 1)
    sites = [i for i, kind in enumerate(kinds) if kind == "hybrid"]
    used = [f"transformer_{i}" for i in range(min(num_blocks, len(sites)))]
    return {
        **vocabulary(config),
        "hidden_dim": config["hidden_size"],
        "blocks": [_block(kinds, i, sites, num_blocks) for i in range(len(kinds))],
        "sublayers": {"mamba2": _mixer(config), **{name: _transformer(config) for name in used}},
        "layer_norm_epsilon": config.get("rms_norm_eps", 1e-5),
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
    }


def _block(kinds: list[str], i: int, sites: list[int], num_blocks: int) -> str:
    if kinds[i] in MAMBA_LAYERS:
        return "mamba2"
    if kinds[i] == "hybrid":
        return f"transformer_{sites.index(i) % num_blocks}>mamba2"
    known = ", ".join(map(repr, (*MAMBA_LAYERS, "hybrid")))
    raise ValueError(f"Unknown kind of layer {kinds[i]!r}. Known: {known}")


def _mixer(config: Mapping[str, Any]) -> dict[str, Any]:
    inner = int(config.get("mamba_expand", 2) * config["hidden_size"])
    heads = config["n_mamba_heads"]
    if inner % heads:
        raise ValueError(
            "n_mamba_heads must divide mamba_expand * hidden_size. Received: "
            f"n_mamba_heads={heads}, {inner}"
        )
    return {
        "state_dim": config.get("mamba_d_state", 64),
        "head_dim": inner // heads,
        "num_groups": config.get("mamba_ngroups", 1),
        "expansion": whole(inner / config["hidden_size"]),
        "conv_kernel_size": config.get("mamba_d_conv", 4),
        "use_bias": config.get("add_bias_linear", False),
        "use_conv_bias": True,  # whatever the configuration says
        "layer_norm_epsilon": EPSILON,
        # The original code has none. transformers 5 takes `time_step_min` for one, in prefill.
        "time_step_limit": limits(config.get("time_step_limit")),
    }


def _transformer(config: Mapping[str, Any]) -> dict[str, Any]:
    d, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim, rank = 2 * d // heads, config.get("adapter_rank", 128)
    return {
        "kind": "shared_transformer",
        "attention": {
            "num_query_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "head_dim": head_dim,
            "rotary_dim": head_dim if config.get("use_mem_rope", False) else 0,
            "rope_max_wavelength": rope_theta(config),
            "scale": (head_dim / 2) ** -0.5,
            "adapter_rank": rank if config.get("use_shared_attention_adapter", False) else None,
        },
        "mlp": {
            "intermediate_dim": config.get("intermediate_size") or 4 * d,
            "activation": "gelu",
            "use_bias": config.get("add_bias_linear", False),
            "adapter_rank": rank,
        },
    }


def config(backbone_config: Mapping[str, Any]) -> dict[str, Any] | None:
    d, blocks = backbone_config["hidden_dim"], backbone_config["blocks"]
    if not all(re.fullmatch(r"(transformer_\d+>)?mamba2", name) for name in blocks):
        return None
    mixer = backbone_config["sublayers"]["mamba2"]
    transformer = sublayers.get(backbone_config, "transformer_0")
    attention, mlp = transformer["attention"], transformer["mlp"]
    if mlp["adapter_rank"] is None:  # what transformers' model always has
        return None
    return {
        "architectures": ["Zamba2ForCausalLM"],
        "model_type": "zamba2",
        **written_vocabulary(backbone_config),
        "hidden_size": d,
        "num_hidden_layers": len(blocks),
        "layers_block_type": ["hybrid" if ">" in name else "mamba" for name in blocks],
        "num_mem_blocks": max(len(backbone_config["sublayers"]) - 1, 1),
        "num_attention_heads": attention["num_query_heads"],
        "num_key_value_heads": attention["num_key_value_heads"],
        "use_shared_attention_adapter": attention["adapter_rank"] is not None,
        "use_mem_rope": attention["rotary_dim"] > 0,
        "rope_theta": attention["rope_max_wavelength"],
        "adapter_rank": mlp["adapter_rank"],
        "intermediate_size": mlp["intermediate_dim"],
        "hidden_act": "gelu",
        "add_bias_linear": mixer["use_bias"],
        "n_mamba_heads": round(mixer["expansion"] * d) // mixer["head_dim"],
        "mamba_ngroups": mixer["num_groups"],
        "mamba_d_state": mixer["state_dim"],
        "mamba_d_conv": mixer["conv_kernel_size"],
        "mamba_expand": mixer["expansion"],
        **written_least(mixer["time_step_limit"]),
        "rms_norm_eps": backbone_config["layer_norm_epsilon"],
        "tie_word_embeddings": backbone_config["tie_word_embeddings"],
    }


def weight_names(backbone_config: Mapping[str, Any]) -> names.Names:
    """What is shared stands in the file at the first layer that has it, adapters of all too."""
    firsts: dict[str, int] = {}
    tables, site, copies = [], 0, {}
    for i, block in enumerate(backbone_config["blocks"]):
        transformer, _, mixer = block.rpartition(">")
        layer = f"model.layers.{i}"
        inner = f"{layer}.mamba_decoder" if transformer else layer
        table = {
            "norm/scale": names.Weight(f"{inner}.input_layernorm.weight"),
            **names.mixer(mixer, f"{inner}.mamba"),
        }
        if transformer:
            first = firsts.setdefault(transformer, i)
            shared = f"model.layers.{first}.shared_transformer"
            copies[f"{layer}.shared_transformer."] = f"{shared}."
            table |= _shared(shared, site)
            table |= names.linear("shared_transformer/linear", f"{layer}.linear")
            site += 1
        tables.append(table)
    outside = names.outside("model.embed_tokens.weight", "model.final_layernorm.weight")
    return names.Names(outside, "", tables, copies=copies)


def _shared(name: str, site: int) -> dict[str, names.Weight]:
    """The weights of a transformer block, with the adapters of one of its places."""
    ours, mlp = "shared_transformer", f"{name}.feed_forward"
    table = {
        f"{ours}/norm/scale": names.Weight(f"{name}.input_layernorm.weight"),
        f"{ours}/mlp_norm/scale": names.Weight(f"{name}.pre_ff_layernorm.weight"),
        **names.attention(f"{ours}/attention", f"{name}.self_attn"),
        **names.linear(f"{ours}/mlp/down", f"{mlp}.down_proj"),
        **_adapter(f"{ours}/mlp/adapter", f"{mlp}.gate_up_proj_adapter_list.{site}"),
    }
    gate_up, halves = f"{mlp}.gate_up_proj", (1, 1)
    for i, part in enumerate(("gate", "up")):
        path = f"{ours}/mlp/{part}"
        table[f"{path}/kernel"] = names.Weight(f"{gate_up}.weight", names.LINEAR, i, halves)
        table[f"{path}/bias"] = names.Weight(f"{gate_up}.bias", names.SAME, i, halves)
    for part in ("query", "key", "value"):
        adapter = f"{name}.self_attn.linear_{part[0]}_adapter_list.{site}"
        table |= _adapter(f"{ours}/attention/{part}_adapter", adapter)
    return table


def _adapter(path: str, name: str) -> dict[str, names.Weight]:
    parts = ("adapter_down", "adapter_up")
    return {
        f"{path}/{part}/kernel": names.Weight(f"{name}.{i}.weight", names.LINEAR)
        for i, part in enumerate(parts)
    }


ZAMBA2 = Architecture(
    name="Zamba2",
    model_type="zamba2",
    arguments=arguments,
    names=weight_names,
    config=config,
)
