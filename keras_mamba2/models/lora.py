"""LoRA on the projections of a backbone: what KerasHub's `enable_lora` leaves open."""

from collections.abc import Mapping

import h5py

from keras_mamba2._compat.keras_hub_models import lora_rank
from keras_mamba2._compat.keras_hub_models import set_lora_layers
from keras_mamba2._compat.keras_layers import flatten_layers
from keras_mamba2._compat.keras_layers import untrack_variable
from keras_mamba2.layers.experts_projection import AnyProjection
from keras_mamba2.layers.projection import LORA_MODES
from keras_mamba2.models.stacked_blocks import check_apart


def projections(backbone) -> list[AnyProjection]:
    """All matrices of the blocks, each once: blocks may share some."""
    return list(dict.fromkeys(layer for block in backbone.blocks for layer in block.projections))


def adapted_projections(backbone) -> list[AnyProjection]:
    return [layer for layer in projections(backbone) if layer.lora_enabled]


def projections_named(backbone, names) -> list[AnyProjection]:
    """The projections that are called one of `names`.

    Raises:
        ValueError: for a name that no projection has; KerasHub's own method would take it, and
            freeze the whole model.
    """
    known = sorted({layer.name for layer in projections(backbone)})
    if not names or not set(names) <= set(known):
        raise ValueError(
            f"`target_layer_names` must be some of {known}. Received: {list(names or ())}"
        )
    return [layer for layer in projections(backbone) if layer.name in names]


def enable(backbone, adapters: Mapping[AnyProjection, tuple[int, float]]) -> None:
    """Freezes the model and adds an adapter to each layer in `adapters`: its `(rank, alpha)`.

    Biases are frozen too, so that adapters hold all that training changes.

    Raises:
        ValueError: before anything changes, if there are adapters already, or for a layer that
            is quantized in a mode that Keras does not train adapters on.
    """
    if adapted_projections(backbone):
        raise ValueError(
            "LoRA is enabled already. `merge_lora()` makes the adapters part of the weights."
        )
    replace(backbone, adapters)


def replace(backbone, adapters: Mapping[AnyProjection, tuple[int, float]]) -> None:
    """As `enable`, in the place of the adapters that there are, which are given up."""
    check_apart(backbone)
    _check_trainable(adapters)
    for layer in adapted_projections(backbone):
        _remove_adapter(layer)
    backbone.trainable = True
    for layer in flatten_layers(backbone, include_self=False):
        layer.trainable = False
    for layer, (rank, alpha) in adapters.items():
        layer.trainable = True
        layer.enable_lora(rank, lora_alpha=alpha)
        if layer.bias is not None:
            layer.bias.trainable = False
    _remember(backbone)


def _check_trainable(layers) -> None:
    for layer in layers:
        if layer.quantization_mode not in LORA_MODES:
            raise ValueError(
                f"LoRA needs weights in float, int8 or int4. Layer {layer.path!r} is quantized "
                f"with mode={layer.quantization_mode!r}."
            )


def _numbered_layers(backbone) -> list:
    """The layers as KerasHub's files of adapters number them."""
    return [layer for layer in flatten_layers(backbone, include_self=False) if layer.weights]


def _remember(backbone) -> None:
    """Tells programs, and KerasHub's `save_lora_weights` and `load_lora_weights`, what there is."""
    adapted = set(adapted_projections(backbone))
    numbered = enumerate(_numbered_layers(backbone))
    indices = [i for i, layer in numbered if layer in adapted]
    ranks = {layer.lora_rank for layer in adapted}
    set_lora_layers(backbone, indices, ranks.pop() if len(ranks) == 1 else None)
    backbone.adapter_scales = tuple(
        (layer.path, layer.lora_alpha / layer.lora_rank) for layer in adapted_projections(backbone)
    )


def merge(backbone) -> None:
    """Adds each adapter to the weights it adapts, and removes it."""
    layers = adapted_projections(backbone)
    if not layers:
        raise ValueError("There is no LoRA adapter to merge.")
    try:
        for layer in layers:
            merged: dict = {}
            layer.save_own_variables(merged)  # which merges, and quantizes anew
            layer.load_own_variables(merged)  # which leaves an adapter of zeros
            _remove_adapter(layer)
    finally:  # after an error outputs are the same, and the rest can still be merged
        _remember(backbone)
    backbone.trainable = True


def _remove_adapter(layer: AnyProjection) -> None:
    for name in ("lora_kernel_a", "lora_kernel_b"):
        untrack_variable(layer, getattr(layer, name))
        setattr(layer, name, None)
    layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None


def check_uniform(backbone) -> None:
    """Raises for adapters that KerasHub's file has no place for: it knows one rank and no alpha."""
    for layer in adapted_projections(backbone):
        if lora_rank(backbone) is None or layer.lora_alpha != lora_rank(backbone):
            raise ValueError(
                "A file of `save_lora_weights` holds adapters of one rank, with an alpha equal to "
                "it. Use `save_peft_adapter` of the model instead. Received: "
                f"layer {layer.path!r} with rank={layer.lora_rank}, alpha={layer.lora_alpha}"
            )


def read_file(backbone, filepath) -> tuple[list[AnyProjection], int]:
    """The layers that a file of `save_lora_weights` has adapters for, and their rank.

    Raises:
        ValueError: if these are not all projections of some names, those of LoRA where it is
            enabled, or of another size: KerasHub would load what it can.
    """
    factors_of = ("lora_kernel_a", "lora_kernel_b")
    try:
        with h5py.File(filepath) as file:
            rank = int(file["lora"]["vars"]["rank"][()])
            shapes = {
                int(i): tuple(group["vars"][name].shape for name in factors_of)
                for i, group in file["lora"].items()
                if i.isdigit()
            }
    except FileNotFoundError:
        raise
    except (KeyError, OSError, AttributeError, TypeError) as error:
        raise ValueError(f"{filepath} is no whole file of `save_lora_weights`: {error}") from error
    numbered = dict(enumerate(_numbered_layers(backbone)))
    layers = [numbered.get(i) for i in shapes]
    names = {layer.name for layer in layers if layer is not None}
    expected = {layer for layer in projections(backbone) if layer.name in names}
    if set(layers) != expected or any(
        factors != numbered[i].lora_shapes(rank) for i, factors in shapes.items()
    ):
        raise ValueError(f"{filepath} holds the adapters of another model.")
    adapted = set(adapted_projections(backbone))
    if adapted and adapted != expected:
        raise ValueError(
            f"{filepath} holds adapters of {sorted(names)}, but LoRA is enabled on "
            f"{sorted({layer.name for layer in adapted})}."
        )
    return [layer for layer in projections(backbone) if layer in expected], rank
