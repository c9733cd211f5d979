"""What values a configuration may have: looked at before anything is computed with them.

A `config.json` comes from others. A text where a number belongs, a billion layers or NaN would fail
somewhere, late, or not at all.
"""

import math
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from keras_mamba2.untrusted import shortened

# More than any model has. What is built of so many layers without weights takes seconds.
MOST_LAYERS = 1024
MOST_EXPERTS = 4096  # eight times as many as any model has; each has tensors of its own
LARGEST_SIZE = 2**31 - 1


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_size(value) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SIZE


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_SIZE


def _is_pair(value) -> bool:
    """Two numbers in order; `None` for no upper limit."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return False
    low, high = value
    return _is_number(low) and low >= 0 and (high is None or (_is_number(high) and low <= high))


def _are(test: Callable[[Any], bool], most: int | None = None) -> Callable[[Any], bool]:
    def check(value) -> bool:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and len(value) <= (most or len(value)) and all(map(test, value))

    return check


class Kind(NamedTuple):
    """What the values of some keys have in common.

    Args:
        words: string, for an error.
        test: function of a value.
        keys: string, the keys, with blanks between them: those of transformers and state-spaces,
            and the arguments of the layers here.
    """

    words: str
    test: Callable[[Any], bool]
    keys: str = ""


KINDS = (
    Kind(
        f"a whole number from 1 to {MOST_LAYERS}",
        lambda value: _is_size(value) and value <= MOST_LAYERS,
        "num_hidden_layers n_layer num_layers",
    ),
    Kind(
        f"a whole number from 0 to {MOST_EXPERTS}",
        lambda value: _is_count(value) and value <= MOST_EXPERTS,
        "num_local_experts n_routed_experts num_experts",
    ),
    Kind(
        "a positive whole number",
        _is_size,
        """vocab_size unpadded_vocab_size hidden_size num_heads head_dim state_size n_groups
        conv_kernel num_attention_heads num_key_value_heads attention_head_dim intermediate_size
        shared_intermediate_size mamba_n_heads mamba_d_ssm mamba_d_state mamba_n_groups mamba_d_conv
        n_mamba_heads mamba_ngroups num_heads_kv
        mamba_num_heads mamba_head_dim ssm_state_size
        d_model pad_vocab_size_multiple d_state headdim ngroups
        vocabulary_size unpadded_vocabulary_size hidden_dim state_dim num_groups input_dim
        chunk_size num_query_heads intermediate_dim num_experts_per_token
        num_expert_groups num_groups_per_token latent_dim""",
    ),
    Kind(
        "a whole number, not negative",
        _is_count,
        """num_experts_per_tok moe_intermediate_size
        moe_shared_expert_intermediate_size n_group topk_group moe_latent_size num_mem_blocks
        adapter_rank d_intermediate rotary_dim rotary_emb_dim mlp_dim
        d_conv conv_kernel_size""",
    ),
    Kind(
        "a positive whole number, or 'auto'",
        lambda value: value == "auto" or _is_size(value),
        "mamba_d_head",
    ),
    Kind(
        "a positive number",
        lambda value: _is_number(value) and value > 0,
        """expand mamba_expand logits_scaling rope_theta rotary_emb_base time_step_min time_step_max
        dt_min dt_max expansion rope_max_wavelength""",
    ),
    Kind(
        "a finite number, not negative",
        lambda value: _is_number(value) and value >= 0,
        """layer_norm_epsilon norm_epsilon norm_eps rms_norm_eps time_step_floor dt_init_floor
        partial_rotary_factor""",
    ),
    Kind(
        "a number from 0 up to 1",
        lambda value: _is_number(value) and 0 <= value < 1,
        "dropout",
    ),
    Kind(
        "a finite number",
        _is_number,
        """embedding_multiplier residual_multiplier logits_multiplier lm_head_multiplier
        attention_multiplier key_multiplier attention_in_multiplier attention_out_multiplier
        ssm_in_multiplier ssm_out_multiplier routed_scaling_factor input_multiplier
        output_multiplier gate_multiplier weights_multiplier scale softmax_scale""",
    ),
    Kind(
        "true or false",
        lambda value: isinstance(value, bool),
        """use_bias use_conv_bias residual_in_fp32 tie_word_embeddings tie_embeddings bias conv_bias
        mlp_bias attention_bias mamba_proj_bias mamba_conv_bias projectors_bias mamba_rms_norm
        mamba_norm_before_gate norm_topk_prob rmsnorm norm_before_gate D_has_hdim rms_norm
        use_output_bias gated normalize_weights remat causal qkv_proj_bias out_proj_bias
        rotary_emb_interleaved add_bias_linear use_mem_rope use_long_context
        use_shared_attention_adapter""",
    ),
    Kind(
        "a text",
        lambda value: isinstance(value, str),
        """model_type hidden_act mlp_hidden_act mamba_hidden_act position_embedding_type layer
        rope_type gated_norm activation scoring kind""",
    ),
    Kind(
        f"a list of at most {2 * MOST_LAYERS} texts",
        _are(lambda value: isinstance(value, str), 2 * MOST_LAYERS),
        "layer_types layers_block_type blocks",
    ),
    Kind(
        f"a list of at most {MOST_LAYERS} whole numbers",
        _are(_is_count, MOST_LAYERS),
        "attn_layer_indices attn_layer_idx",
    ),
    Kind(
        "a list of finite numbers",
        _are(_is_number, MOST_LAYERS),
        "ssm_multipliers mlp_multipliers projection_multipliers",
    ),
    Kind("a pair of numbers in order", _is_pair, "A_init_range a_initializer_range"),
    Kind(
        "an object",
        lambda value: isinstance(value, Mapping),
        "ssm_cfg attn_cfg rope_parameters rope_scaling sublayers attention mlp",
    ),
)
BY_KEY = {key: kind for kind in KINDS for key in kind.keys.split()}
# What a pattern of layers may have: one character a layer.
BY_KEY["hybrid_override_pattern"] = Kind(
    f"a text of at most {MOST_LAYERS} characters",
    lambda value: isinstance(value, str) and len(value) <= MOST_LAYERS,
)
# Spellings of infinity are many in files: `values.limits` knows them, and gives a pair.
LIMITS = Kind("a pair of numbers in order", _is_pair)

# Of the arguments of layers here.
MAY_BE_NONE = {"chunk_size", "unpadded_vocabulary_size", "latent_dim", "scale", "adapter_rank"}
MAY_BE_NONE |= {"projection_multipliers", "use_output_bias"}


def check_values(config: Mapping[str, Any], path: str = "") -> None:
    """Raises for a value that none of this key can be, also inside; `null` is for none.

    Keys that nobody reads may be anything.

    Raises:
        ValueError: that names key and value.
    """
    for key, value in config.items():
        kind = BY_KEY.get(key)
        if value is None or kind is None:
            continue
        check_value(key, value, kind, path)
        if isinstance(value, Mapping):
            inside = value.values() if key == "sublayers" else [value]
            for part in inside:
                if not isinstance(part, Mapping):
                    raise ValueError(
                        f"`{path}{key}` must hold objects. Received: {shortened(part)}"
                    )
                check_values(part, f"{path}{key}.")


def check_value(key: str, value: Any, kind: Kind, path: str = "") -> None:
    if not kind.test(value):
        raise ValueError(f"`{path}{key}` must be {kind.words}. Received: {key}={shortened(value)}")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """As `check_values`, for the arguments of a backbone, of which few may be `None`."""
    check_values(arguments)
    for part in (arguments, *(arguments.get("sublayers") or {}).values()):
        if part.get("time_step_limit") is not None:
            check_value("time_step_limit", part["time_step_limit"], LIMITS)
        for key, value in part.items():
            if value is None and key in BY_KEY and key not in MAY_BE_NONE:
                raise ValueError(f"`{key}` must be {BY_KEY[key].words}. Received: {key}=None")
