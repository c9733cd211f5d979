"""Backbone, its state, and the tokenizer, which is a leaf that knows no model."""

from typing import Any

from keras_mamba2 import preset_files
from keras_mamba2._compat.keras_hub_presets import register_presets
from keras_mamba2.models.mamba2_backbone import Mamba2Backbone as Mamba2Backbone
from keras_mamba2.models.mamba2_hybrid_backbone import Mamba2HybridBackbone as Mamba2HybridBackbone
from keras_mamba2.models.mamba2_tokenizer import Mamba2Tokenizer as Mamba2Tokenizer
from keras_mamba2.state import Mamba2State as Mamba2State

# KerasHub finds the tokenizer of a model by its backbone.
Mamba2Tokenizer.backbone_cls = Mamba2Backbone

_PRESETS: dict[str, dict[str, Any]] = {
    name: {
        "metadata": preset_files.read_json(folder / preset_files.METADATA_FILE),
        "kaggle_handle": str(folder),
    }
    for name, folder in preset_files.named_presets().items()
}
_HYBRIDS = {
    name: preset
    for name, preset in _PRESETS.items()
    if preset["metadata"].get("path") == "mamba2_hybrid"
}
# `presets` of the classes lists them, and `keras_hub.models.CausalLM.from_preset` knows them. A
# task looks for its own at `Mamba2Backbone`, and takes either.
register_presets(_PRESETS, Mamba2Backbone)
register_presets(_HYBRIDS, Mamba2HybridBackbone)
