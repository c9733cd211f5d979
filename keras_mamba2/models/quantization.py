"""What `quantize` needs to know of a backbone, beside what Keras does."""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
from keras.dtype_policies import DTypePolicyMap

from keras_mamba2._compat.keras_layers import flatten_layers
from keras_mamba2._compat.keras_layers import is_chosen
from keras_mamba2._compat.keras_layers import stored_embeddings
from keras_mamba2._compat.keras_layers import stored_kernel
from keras_mamba2.arguments import instance
from keras_mamba2.arguments import optional
from keras_mamba2.arguments import shown
from keras_mamba2.layers.experts_projection import AnyProjection
from keras_mamba2.layers.projection import CALIBRATED_MODES
from keras_mamba2.layers.projection import Projection
from keras_mamba2.layers.reversible_embedding import ReversibleEmbedding
from keras_mamba2.models.layout import check_layout
from keras_mamba2.models.lora import projections
from keras_mamba2.models.stacked_blocks import check_apart

# Keras 3.15 corrects errors in blocks of so many inputs, and starts a new group with each.
GPTQ_BLOCK_SIZE = 128


CONFIG = optional(
    instance(keras.quantizers.QuantizationConfig, "a configuration of `keras.quantizers`")
)


def prepare(backbone, config, filters) -> Callable[[keras.layers.Layer], bool]:
    """Looks at all that `quantize` of a backbone, or a task with it, gets: `checked_filters`."""
    check(backbone, config)
    return checked_filters(backbone, config, filters)


def checked_filters(model, config, filters) -> Callable[[keras.layers.Layer], bool]:
    """`filters` of `keras.Model.quantize`, but only for layers that are saved quantized.

    Of others Keras would warn that it has no quantization for them, or quantize the head of a
    classifier, whose policy is in no configuration.

    Raises:
        ValueError: before a layer changes, for what is no filter, a layer that is quantized
            already, and one with a LoRA adapter in a mode that Keras does not combine with it.
    """
    if not (filters is None or callable(filters) or isinstance(filters, (str, list, tuple))):
        raise ValueError(
            "`filters` must be a regular expression, a list of them, or a function of a layer. "
            f"Received: filters={shown(filters)}"
        )

    def is_in(layer) -> bool:
        return isinstance(layer, AnyProjection | ReversibleEmbedding) and is_chosen(layer, filters)

    chosen = list(filter(is_in, flatten_layers(model)))
    for layer in chosen:
        if layer.quantization_mode is not None:
            raise ValueError(
                f"Layer {layer.path!r} is already quantized with mode={layer.quantization_mode!r}. "
                "Choose other layers with `filters`, or quantize the model as it was before. "
                f"Received: mode={config.mode!r}"
            )
        if isinstance(layer, Projection):
            layer.check_mode(config.mode)
    if config.mode in ("int8", "int4"):
        check_layout(dict(part for layer in chosen for part in _rounded_axes(layer, config.mode)))
    return is_in


def _rounded_axes(layer, mode: str) -> Iterator[tuple[str, dict[str, int]]]:
    """The variables of a layer, and their axes as they are in `mode`, for `check_layout`."""

    def halved(size: int) -> int:
        return size if mode == "int8" else -(-size // 2)

    if isinstance(layer, ReversibleEmbedding):
        vocabulary, hidden = layer.input_dim, halved(layer.output_dim)
        path = stored_embeddings(layer).path
        yield path, {"vocabulary_size": vocabulary, "packed hidden_dim": hidden}
        if not layer.tie_weights:
            axes = {"packed hidden_dim": hidden, "vocabulary_size": vocabulary}
            yield layer.reverse_embeddings.path, axes
        return
    kernel = stored_kernel(layer) if isinstance(layer, Projection) else layer.kernel
    *experts, rows, columns = kernel.shape
    axes = {"inputs": rows, "packed outputs": halved(columns)}
    if experts:
        axes = {"num_experts": experts[0], **axes}
    elif mode == "int8":
        axes = {"outputs": columns, "inputs": rows}
    yield kernel.path, axes


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
        ValueError: for stacked blocks, float8 of shared ones, GPTQ and AWQ without data or
            tokenizer, or of blocks that Keras cannot run alone, and GPTQ with weights that are not
            float32, or groups that Keras cannot count.
    """
    check_apart(backbone)
    CONFIG("config", config)
    if config is not None and config.mode == "float8":
        places = [layer for block in backbone.blocks for layer in block.projections]
        if len(places) > len(projections(backbone)):
            raise ValueError(
                "Keras trains the scales of float8 layer by layer, and blocks of this model share "
                "some: their scales would be added. Quantize it to 'int8' or 'int4'. "
                "Received: mode='float8'"
            )
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


def remember_policies(model) -> None:
    """Keeps the dtype policy of every layer for `get_config` of a backbone, or a model without one.

    KerasHub's own forgets that of the layers which are not quantized: they would be loaded in the
    global dtype.
    """
    if not isinstance(model.dtype_policy, DTypePolicyMap):
        model.dtype_policy = DTypePolicyMap(model.dtype_policy.name)
    policies = model.dtype_policy
    for layer in flatten_layers(model):
        shares = isinstance(layer.dtype_policy, DTypePolicyMap)  # and keeps it up to date
        if layer.quantization_mode and not shares and layer.path not in policies:
            policies[layer.path] = layer.dtype_policy
