"""Pure Mamba-2 of its authors, `mamba_ssm`."""

import math
from collections.abc import Mapping
from typing import Any

from keras_mamba2.conversion import names
from keras_mamba2.conversion.architectures.architecture import PURE
from keras_mamba2.conversion.architectures.architecture import Architecture
from keras_mamba2.conversion.architectures.mamba2 import BLOCK
from keras_mamba2.conversion.architectures.values import limits

# Constructor argument -> key of `ssm_cfg`, and what `mamba_ssm.Mamba2` takes without it.
SSM_KEYS = {
    "state_dim": ("d_state", 128),
    "head_dim": ("headdim", 64),
    "num_groups": ("ngroups", 1),
    "expansion": ("expand", 2),
    "conv_kernel_size": ("d_conv", 4),
    "use_bias": ("bias", False),
    "use_conv_bias": ("conv_bias", True),
    "time_step_min": ("dt_min", 0.001),
    "time_step_max": ("dt_max", 0.1),
    "time_step_floor": ("dt_init_floor", 1e-4),
}

# Options of `mamba_ssm` that change the architecture, and the one value that is Mamba-2's.
SSM_FIXED = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "d_ssm": None}
FIXED = {"rms_norm": True, "d_intermediate": 0}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    ssm = config["ssm_cfg"]
    if config.get("attn_layer_idx"):
        layers = ", ".join(map(str, sorted(config["attn_layer_idx"])))
        raise ValueError(
            "The checkpoint is a hybrid with attention after a convolution, which is not supported "
            f"yet. Attention layers: {layers}"
        )
    for options, fixed in ((ssm, SSM_FIXED), (config, FIXED)):
        for key, value in fixed.items():
            if options.get(key, value) != value:
                raise ValueError(f"`{key}` must be {value}. Received: {key}={options[key]}")
    for key in ("d_model", "n_layer", "vocab_size"):
        if key not in config:
            raise ValueError(f"The configuration of a state-spaces checkpoint has no `{key}`.")
    multiple = config.get("pad_vocab_size_multiple", 8)  # the default of `mamba_ssm`
    return {
        **{argument: ssm.get(*key) for argument, key in SSM_KEYS.items()},
        "vocabulary_size": -(-config["vocab_size"] // multiple) * multiple,
        "unpadded_vocabulary_size": config["vocab_size"],
        "num_layers": config["n_layer"],
        "hidden_dim": config["d_model"],
        "layer_norm_epsilon": config.get("norm_epsilon", 1e-5),
        "time_step_limit": limits(ssm.get("dt_limit", (0.0, math.inf))),
        "a_initializer_range": tuple(ssm.get("A_init_range", (1, 16))),
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
    }


STATE_SPACES = Architecture(
    name="state-spaces",
    model_type=None,
    backbone=PURE,
    arguments=arguments,
    names=names.Names(
        names.outside("backbone.embedding.weight", "backbone.norm_f.weight"),
        "backbone.layers.{}.",
        [BLOCK],
    ),
)
