import json
import pathlib
from collections.abc import Callable
from typing import Any
from typing import Self

import keras

from keras_mamba2.conversion.preset_loader import AUTO
from keras_mamba2.conversion.preset_loader import check_is_not_quantized
from keras_mamba2.conversion.preset_loader import is_quantized
from keras_mamba2.preset_files import CONFIG_FILE
from keras_mamba2.preset_files import KERAS_WEIGHTS
from keras_mamba2.preset_files import Preset
from keras_mamba2.preset_files import read_json


class ModelPreset:
    """A model that is a preset by itself: its configuration and its weights, and no backbone."""

    from_config: Callable[..., Any]
    save_weights: Callable[..., Any]

    def save_to_preset(self, preset_dir) -> None:
        config = keras.saving.serialize_keras_object(self)
        config.pop("compile_config", None)  # as in KerasHub's presets
        folder = pathlib.Path(preset_dir)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=4))
        self.save_weights(folder / KERAS_WEIGHTS[0])

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs) -> Self:
        """Loads a model from a folder or from `hf://user/name`.

        Args:
            preset: a folder of `save_to_preset`, or a repository with its files.
            load_weights: bool. If false, the weights are those of a new model.
            **kwargs: arguments of the constructor that replace the saved ones. Without `dtype`,
                the model has the current dtype policy; `dtype="auto"` keeps the saved one, as
                quantized weights always do.

        Raises:
            ValueError: for a preset of something else, one with missing or damaged files, and
                another dtype for quantized weights.
        """
        name = keras.saving.get_registered_name(cls)
        files = Preset(preset)
        folder = pathlib.Path(files.keras_folder(load_weights, tokenizer=False, names=[name]))
        saved = read_json(folder / CONFIG_FILE)["config"]
        dtype = _dtype(preset, saved.get("dtype"), kwargs.pop("dtype", None))
        model = cls.from_config({**saved, **kwargs, "dtype": dtype})
        if load_weights:
            model.load_weights(folder / KERAS_WEIGHTS[0])
        return model


def _dtype(preset: str, saved, asked):
    """The dtype to load a model in, that was `saved` in one and is `asked` for in another."""
    check_is_not_quantized(preset, saved, asked)
    return saved if asked == AUTO or is_quantized(saved) else asked
