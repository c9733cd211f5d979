"""What llama.cpp calls a model's weights and sizes, and what it stores otherwise than transformers.

A table of names for each family. The source is llama.cpp's own `convert_hf_to_gguf.py`, beside the
graphs in its `src/models`; this module writes what they read, and knows no GGUF library.
"""

import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Config = Mapping[str, Any]  # of transformers, as in `config.json`
ATTENTION_LAYERS = ("attention", "full_attention")  # in files of transformers 4 and 5
ANY_STEP = ([0.0, {"__float__": "Infinity"}], [0.0, float("inf")], None)
Weight = tuple[str, np.ndarray]  # its name, in float32
MAX_TOKENS = 2**20  # that a file allows; how many fit says the context
IN_BLOCK = re.compile(r"(?:backbone|model)\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Family:
    """Names of llama.cpp by those of transformers, outside of blocks and in one.

    Several names, separated by blanks, share the rows of what is one array in transformers.
    """

    architecture: str
    outside: Mapping[str, str]
    block: Mapping[str, str]
    # Configuration -> values for the methods `add_...` of `gguf.GGUFWriter`.
    sizes: Callable[[Config], dict[str, Any]]
    # Configuration -> factors by llama.cpp's names, where it has no multiplier of its own.
    factors: Callable[[Config], dict[str, Any]] = lambda config: {}
    # Configuration -> the values that llama.cpp's graph takes for granted.
    assumed: Callable[[Config], dict[str, tuple[Any, ...]]] = lambda config: {}


def below(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {prefix + name: other for name, other in names.items()}


MIXER = {
    "in_proj.weight": "ssm_in.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias",
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
}
ATTENTION = {
    "q_proj.weight": "attn_q.weight",
    "k_proj.weight": "attn_k.weight",
    "v_proj.weight": "attn_v.weight",
    "o_proj.weight": "attn_output.weight",
}


def mamba2_sizes(config: Config) -> dict[str, Any]:
    heads = config["num_heads"]
    return {
        **outer_sizes(config, config.get("layer_norm_epsilon", 1e-5)),
        "feed_forward_length": 0,  # must be said
        "head_count": 0,
        "ssm_conv_kernel": config["conv_kernel"],
        "ssm_inner_size": heads * config["head_dim"],
        "ssm_state_size": config["state_size"],
        "ssm_time_step_rank": heads,
        "ssm_group_count": config["n_groups"],
    }


def granite_sizes(config: Config) -> dict[str, Any]:
    kv_heads = config["num_key_value_heads"]
    shared, experts = config["shared_intermediate_size"], config["num_local_experts"]
    sizes = {
        **hybrid_sizes(config),
        "feed_forward_length": config["intermediate_size"] if experts else shared,
        # Without keys and values a layer is a mixer.
        "head_count_kv": [kv_heads * (kind in ATTENTION_LAYERS) for kind in config["layer_types"]],
        "attention_scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": config["logits_scaling"],  # a divisor, in both
        "rope_scaling_finetuned": False,  # no positions
    }
    if experts:
        sizes["expert_count"] = experts
        sizes["expert_used_count"] = config["num_experts_per_tok"]
        sizes["expert_shared_feed_forward_length"] = shared
    return sizes


def falcon_sizes(config: Config) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config
    return {
        **hybrid_sizes(config),
        "feed_forward_length": config["intermediate_size"],
        "head_count_kv": config["num_key_value_heads"],
        "key_length": config["head_dim"],
        "value_length": config["head_dim"],
        "rope_dimension_count": config["head_dim"],
        "rope_freq_base": rope["rope_theta"],
    }


def hybrid_sizes(config: Config) -> dict[str, Any]:
    heads = config["mamba_n_heads"]
    return {
        **outer_sizes(config, config["rms_norm_eps"]),
        "head_count": config["num_attention_heads"],
        "ssm_conv_kernel": config["mamba_d_conv"],
        "ssm_inner_size": heads * config["mamba_d_head"],
        "ssm_state_size": config["mamba_d_state"],
        "ssm_time_step_rank": heads,
        "ssm_group_count": config["mamba_n_groups"],
    }


def outer_sizes(config: Config, epsilon: float) -> dict[str, Any]:
    return {
        "context_length": MAX_TOKENS,
        "vocab_size": config["vocab_size"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "layer_norm_rms_eps": epsilon,
    }


def falcon_factors(config: Config) -> dict[str, Any]:
    """llama.cpp has no multipliers for this family: they are in the weights."""
    inner = config["mamba_n_heads"] * config["mamba_d_head"]
    bc = config["mamba_n_groups"] * config["mamba_d_state"]
    columns = np.repeat(config["ssm_multipliers"], (inner, inner, bc, bc, config["mamba_n_heads"]))
    gate, down = config["mlp_multipliers"]
    attention = config["attention_in_multiplier"]
    return {
        "token_embd.weight": config["embedding_multiplier"],
        "output.weight": config["lm_head_multiplier"],
        "ssm_in.weight": config["ssm_in_multiplier"] * columns[:, None],
        "ssm_out.weight": config["ssm_out_multiplier"],
        "attn_q.weight": attention,
        "attn_k.weight": attention * config["key_multiplier"],
        "attn_v.weight": attention,
        "attn_output.weight": config["attention_out_multiplier"],
        "ffn_gate.weight": gate,
        "ffn_down.weight": down,
    }


def granite_assumed(config: Config) -> dict[str, tuple[Any, ...]]:
    return {
        "mamba_expand": (2,),
        "position_embedding_type": ("nope", None),
        "time_step_limit": ANY_STEP,
    }


def falcon_assumed(config: Config) -> dict[str, tuple[Any, ...]]:
    gate_first = {"mamba_norm_before_gate": (False,)} if config["mamba_rms_norm"] else {}
    # Of one matrix for both ends the factors would differ.
    return {"tie_word_embeddings": (False,), "time_step_limit": ANY_STEP, **gate_first}


MAMBA2 = Family(
    architecture="mamba2",
    outside={
        "backbone.embeddings.weight": "token_embd.weight",
        "backbone.norm_f.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    block={"norm.weight": "attn_norm.weight", **below("mixer.", MIXER)},
    sizes=mamba2_sizes,
    assumed=lambda config: {"time_step_limit": ANY_STEP},
)
GRANITE_EXPERTS = Family(
    architecture="granitehybrid",
    outside={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    block={
        "input_layernorm.weight": "attn_norm.weight",
        **below("mamba.", MIXER),
        **below("self_attn.", ATTENTION),
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "shared_mlp.input_linear.weight": "ffn_gate_shexp.weight ffn_up_shexp.weight",
        "shared_mlp.output_linear.weight": "ffn_down_shexp.weight",
        "block_sparse_moe.router.layer.weight": "ffn_gate_inp.weight",
        "block_sparse_moe.input_linear.weight": "ffn_gate_exps.weight ffn_up_exps.weight",
        "block_sparse_moe.output_linear.weight": "ffn_down_exps.weight",
    },
    sizes=granite_sizes,
    assumed=granite_assumed,
)
GRANITE = Family(
    architecture="granitehybrid",
    outside=GRANITE_EXPERTS.outside,
    # Without experts the shared MLP is the only one.
    block={name: there.replace("_shexp", "") for name, there in GRANITE_EXPERTS.block.items()},
    sizes=granite_sizes,
    assumed=GRANITE_EXPERTS.assumed,
)
FALCON_H1 = Family(
    architecture="falcon-h1",
    outside={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.final_layernorm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    block={
        "input_layernorm.weight": "attn_norm.weight",
        **below("mamba.", MIXER),
        **below("self_attn.", ATTENTION),
        "pre_ff_layernorm.weight": "ffn_norm",  # so it is called there
        "feed_forward.gate_proj.weight": "ffn_gate.weight",
        "feed_forward.up_proj.weight": "ffn_up.weight",
        "feed_forward.down_proj.weight": "ffn_down.weight",
    },
    sizes=falcon_sizes,
    factors=falcon_factors,
    assumed=falcon_assumed,
)


def family_of(config: Config) -> Family:
    """The family that a configuration is of, if llama.cpp computes what it says.

    Raises:
        ValueError: if there is no table for it, or llama.cpp takes something else for granted.
    """
    granite = GRANITE_EXPERTS if config.get("num_local_experts") else GRANITE
    families = {"mamba2": MAMBA2, "granitemoehybrid": granite, "falcon_h1": FALCON_H1}
    kind = config.get("model_type")
    if kind not in families:
        raise ValueError(f"No GGUF file of `model_type` {kind!r}. Expected: {', '.join(families)}.")
    family = families[kind]
    for name, values in family.assumed(config).items():
        if (value := config.get(name, values[0])) not in values:
            raise ValueError(
                f"llama.cpp knows {kind!r} with {name}={values[0]!r} only. Received: {value!r}."
            )
    return family


def tensors(config: Config, weights: Iterable[Weight]) -> Iterator[Weight]:
    """Yields llama.cpp's names and arrays, from those of transformers.

    Raises:
        ValueError: if a weight has no name there.
    """
    family = family_of(config)
    factors, num_groups = family.factors(config), family.sizes(config)["ssm_group_count"]
    for name, array in weights:
        block, rest = found.groups() if (found := IN_BLOCK.fullmatch(name)) else (None, name)
        names = (family.outside if block is None else family.block).get(rest)
        if names is None:
            raise ValueError(f"llama.cpp's {family.architecture!r} has no weight for {name!r}.")
        parts = names.split()
        arrays = np.split(array, len(parts), axis=-2) if parts[1:] else [array]
        for part, rows in zip(parts, arrays, strict=True):
            stored = as_stored(part, rows, num_groups)
            if part in factors:
                stored = stored * np.float32(factors[part])
            yield part if block is None else f"blk.{block}.{part}", stored


def as_stored(name: str, array: np.ndarray, num_groups: int) -> np.ndarray:
    if name == "ssm_a":
        return -np.exp(array)[:, None]
    if name == "ssm_d":
        return array[:, None]
    if name == "ssm_conv1d.weight":
        return array[:, 0]
    if name == "ssm_norm.weight":
        return array.reshape(num_groups, -1)
    return array
