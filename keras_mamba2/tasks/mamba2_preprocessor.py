from keras_mamba2._compat.keras_hub_presets import load_preprocessor
from keras_mamba2.conversion import open_preset
from keras_mamba2.models import Mamba2Backbone
from keras_mamba2.models import Mamba2Tokenizer
from keras_mamba2.models.residual_backbone import ResidualBackbone
from keras_mamba2.saving import PREPROCESSOR_FILES
from keras_mamba2.saving import AtomicPreset


class Mamba2Preprocessor(AtomicPreset):
    """What the preprocessors of all tasks share. It stands before KerasHub's class in the bases."""

    backbone_cls = Mamba2Backbone
    preset_files = PREPROCESSOR_FILES
    tokenizer_cls = Mamba2Tokenizer
    tokenizer: Mamba2Tokenizer

    @classmethod
    def from_preset(cls, preset: str, **kwargs) -> "Mamba2Preprocessor":
        """Loads a preprocessor by name or folder. See `keras_hub.models.Preprocessor`."""
        loader, preset = open_preset(preset, weights=False)
        if loader is not None:
            return loader.load_preprocessor(cls, **kwargs)
        return load_preprocessor(cls, ResidualBackbone, preset, **kwargs)

    @property
    def _pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id or 0
