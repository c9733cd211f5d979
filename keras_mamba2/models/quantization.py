"""What `quantize` needs to know of a backbone, beside what Keras does."""

from typing import Any

import keras

from keras_mamba2._compat.keras_layers import flatten_layers
from keras_mamba2.arguments import instance
from keras_mamba2.arguments import optional
from keras_mamba2.layers.experts_projection import AnyProjection
from keras_mamba2.layers.projection import CALIBRATED_MODES
from keras_mamba2.layers.projection import Projection
from keras_mamba2.layers.reversible_embedding import ReversibleEmbedding
from keras_mamba2.models.lora import projections
from keras_mamba2.models.stacked_blocks import check_apart

# Keras 3.15 corrects errors in blocks of so many inputs, and starts a new group with each.
GPTQ_BLOCK_SIZE = 128


CONFIG = optional(
    instance(keras.quantizers.QuantizationConfig, "a configuration of `keras.quantizers`")
)


def is_quantizable(layer) -> bool:
    """Keras would warn of every other layer that it has no quantization for it."""
    return isinstance(layer, AnyProjection | ReversibleEmbedding)


def layer_structure(backbone, mode: str) -> dict[str, Any] | None:
    """The order in which GPTQ and AWQ go through the layers."""
    if mode not in CALIBRATED_MODES:
        return None
    return {
        "pre_block_layers": [backbone.token_embedding],
        "sequential_blocks": backbone.blocks,
    }


def check(backbone, config) -> None:
    """Raises for what Keras finds out when the model is half quantized.

    Raises:
        ValueError: for stacked blocks, GPTQ and AWQ without data or tokenizer, or of blocks that
            Keras cannot run alone, and GPTQ with weights that are not float32, or groups that Keras
            cannot count.
    """
    check_apart(backbone)
    CONFIG("config", config)
    if config is None or config.mode not in CALIBRATED_MODES:
        return
    if config.dataset is None or config.tokenizer is None:
        raise ValueError(f"{type(config).__name__} needs a `dataset` and a `tokenizer`.")
    if any(block.sees_embeddings for block in backbone.blocks):
        raise ValueError(
            "GPTQ and AWQ of Keras run block after block, and blocks of this model also see the "
            "embeddings of the tokens. Quantize it to 'int8' or 'int4'. "
            f"Received: mode={config.mode!r}"
        )
    if config.mode == "awq":
        return
    if backbone.variable_dtype != "float32":
        raise ValueError(
            "Keras quantizes with GPTQ only what is stored in float32. Load the model with "
            f"dtype='mixed_bfloat16' or 'float32'. Received: dtype={backbone.variable_dtype!r}"
        )
    layers = [layer for layer in projections(backbone) if isinstance(layer, Projection)]
    widest = max(layer.kernel.shape[0] for layer in layers)
    divides = config.group_size > 0 and GPTQ_BLOCK_SIZE % config.group_size == 0
    if widest > GPTQ_BLOCK_SIZE and not divides:
        raise ValueError(
            f"`group_size` must divide {GPTQ_BLOCK_SIZE}, since Keras quantizes with GPTQ so many "
            f"inputs at a time, and there are up to {widest}. "
            f"Received: group_size={config.group_size}"
        )


def remember_policies(backbone) -> None:
    """Keeps the dtype policy of every layer for `get_config`.

    KerasHub's own forgets that of the layers which are not quantized: they would be loaded in the
    global dtype.
    """
    policy = backbone.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return  # the layers share it, and keep it up to date
    quantized = [layer for layer in flatten_layers(backbone) if layer.quantization_mode]
    policies = {layer.path: layer.dtype_policy for layer in quantized}
    backbone.dtype_policy = keras.dtype_policies.DTypePolicyMap(policy.name, policies)
