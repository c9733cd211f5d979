"""Keys of `config.json` that several families of transformers share, read and written."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from keras_mamba2.conversion.architectures.values import limits
from keras_mamba2.conversion.architectures.values import rope_theta
from keras_mamba2.conversion.architectures.values import whole
from keras_mamba2.conversion.architectures.values import written_limits
from keras_mamba2.conversion.architectures.values import written_vocabulary

# Argument of `Mamba2Mixer` -> key, and what transformers takes without it.
MIXER_KEYS = {
    "state_dim": ("mamba_d_state", 256),
    "num_groups": ("mamba_n_groups", 1),
    "conv_kernel_size": ("mamba_d_conv", 4),
    "use_bias": ("mamba_proj_bias", False),
    "use_conv_bias": ("mamba_conv_bias", True),
}


def mixer(config: Mapping[str, Any], inner: int | None = None) -> dict[str, Any]:
    """The arguments of a mixer of `inner` channels, by default `mamba_expand * hidden_size`."""
    d, heads = config["hidden_size"], config.get("mamba_n_heads", 128)
    inner = round(config.get("mamba_expand", 2) * d) if inner is None else inner
    head_dim = config.get("mamba_d_head", "auto")
    head_dim = inner // heads if head_dim == "auto" else head_dim
    if heads * head_dim != inner:
        raise ValueError(
            "mamba_n_heads * mamba_d_head must be mamba_expand * hidden_size, or mamba_d_ssm. "
            f"Received: {heads} * {head_dim} and {inner}"
        )
    return {
        **{argument: config.get(*key) for argument, key in MIXER_KEYS.items()},
        "head_dim": head_dim,
        "expansion": whole(inner / d),
        "time_step_limit": limits(config.get("time_step_limit")),
    }


def written_mixer(mixer: Mapping[str, Any], hidden_dim: int) -> dict[str, Any]:
    """`mixer` reversed, but for its size, which families write in other ways."""
    return {
        **{key: mixer[argument] for argument, (key, _) in MIXER_KEYS.items()},
        "mamba_n_heads": round(mixer["expansion"] * hidden_dim) // mixer["head_dim"],
        "mamba_d_head": mixer["head_dim"],
        "time_step_limit": written_limits(mixer["time_step_limit"]),
    }


def attention(config: Mapping[str, Any], key_value_heads: int | None = None) -> dict[str, Any]:
    """The arguments of attention; `key_value_heads` is what transformers takes without the key."""
    heads = config["num_attention_heads"]
    return {
        "num_query_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads", key_value_heads) or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rope_max_wavelength": rope_theta(config),
        "use_bias": config.get("attention_bias", False),
    }


def written_attention(attention: Mapping[str, Any]) -> dict[str, Any]:
    """`attention` reversed."""
    return {
        "num_attention_heads": attention["num_query_heads"],
        "num_key_value_heads": attention["num_key_value_heads"],
        "head_dim": attention["head_dim"],
        "rope_theta": attention["rope_max_wavelength"],
        "attention_bias": attention["use_bias"],
    }


def alternate(blocks: Sequence[str]) -> bool:
    """Whether each mixer or attention has a block after it."""
    return len(blocks) % 2 == 0 and set(blocks[::2]) <= {"mamba2", "attention"}


def written_outside(backbone_config: Mapping[str, Any]) -> dict[str, Any]:
    """What is not of one layer."""
    return {
        **written_vocabulary(backbone_config),
        "hidden_size": backbone_config["hidden_dim"],
        "hidden_act": "silu",
        "rms_norm_eps": backbone_config["layer_norm_epsilon"],
        "tie_word_embeddings": backbone_config["tie_word_embeddings"],
    }
