"""Private parts of KerasHub's backbones and tasks."""

from collections.abc import Sequence

import keras_hub


def set_lora_layers(
    backbone: keras_hub.models.Backbone, indices: Sequence[int], rank: int | None
) -> None:
    """Tells `save_lora_weights` and `load_lora_weights` which layers have an adapter.

    `_lora_enabled_layers` and `_lora_rank`, which only KerasHub's own `enable_lora` sets. Written
    for KerasHub 0.32.

    Args:
        backbone: the backbone.
        indices: of the layers with an adapter, in `flatten_layers(backbone, include_self=False)`
            without those that have no weights.
        rank: the rank of all of them, `None` where they differ.
    """
    backbone._lora_enabled_layers = list(indices)
    backbone._lora_rank = rank


def lora_rank(backbone: keras_hub.models.Backbone) -> int | None:
    """The rank that `set_lora_layers` has set, `None` where adapters differ.

    `_lora_rank`. Written for KerasHub 0.32.
    """
    return backbone._lora_rank
