import pathlib
from typing import Any
from typing import Self

import keras_hub

from keras_mamba2._compat.keras_hub_presets import load_preprocessor
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_keywords
from keras_mamba2.arguments import instance
from keras_mamba2.conversion import open_preset
from keras_mamba2.models import Mamba2Backbone
from keras_mamba2.models import Mamba2Tokenizer
from keras_mamba2.models.residual_backbone import ResidualBackbone
from keras_mamba2.saving import PREPROCESSOR_FILES
from keras_mamba2.saving import AtomicPreset

TOKENIZER = instance(keras_hub.tokenizers.Tokenizer, "a `keras_mamba2.Mamba2Tokenizer`")


class Mamba2Preprocessor(AtomicPreset):
    """What the preprocessors of all tasks share. It stands before KerasHub's class in the bases."""

    backbone_cls = Mamba2Backbone
    preset_files = PREPROCESSOR_FILES
    tokenizer_cls = Mamba2Tokenizer
    tokenizer: Mamba2Tokenizer

    @classmethod
    def from_preset(cls, preset: str, **kwargs) -> Self:
        """Loads a preprocessor by name or folder. See `keras_hub.models.Preprocessor`."""
        check_keywords(cls, kwargs, "config_file")
        loader, preset = open_preset(preset, weights=False)
        if loader is not None:
            return loader.load_preprocessor(cls, **kwargs)
        return load_preprocessor(cls, ResidualBackbone, preset, **kwargs)

    @classmethod
    def checkpoint_arguments(cls, folder: pathlib.Path) -> dict[str, Any]:
        """What the constructor gets from a checkpoint of another library, beside its tokenizer."""
        return {}

    @property
    def sequence_length(self) -> int:
        return super().sequence_length

    @sequence_length.setter
    def sequence_length(self, value: int) -> None:
        inherited = super(Mamba2Preprocessor, type(self)).sequence_length
        inherited.fset(self, SIZE("sequence_length", value))

    @property
    def _pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id or 0
