"""Private parts of KerasHub's presets."""

import sys
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import keras
from keras_hub.src.utils import preset_utils


class KerasPresetLoader(preset_utils.KerasPresetLoader):
    """Loads presets in KerasHub's format whose backbone tasks do not name as theirs.

    KerasHub looks for tasks by the one class of backbones that each names. Written for KerasHub
    0.32.

    Args:
        preset: string, as there.
        config: dict, what `config.json` holds.
        backbone_cls: the class that tasks for it name.
    """

    def __init__(self, preset: str, config: dict[str, Any], backbone_cls: type):
        super().__init__(preset, config)
        self._backbone_cls = backbone_cls

    def check_backbone_class(self) -> type:
        return self._backbone_cls


class PresetLoader(preset_utils.PresetLoader):
    """Loads the parts of a preset; builds preprocessors and tasks from a tokenizer and backbone.

    `preset_utils.PresetLoader`. Written for KerasHub 0.32.
    """


def register_presets(presets: Mapping[str, Mapping[str, Any]], backbone_cls: type) -> None:
    """Makes presets known by name to `from_preset` of `backbone_cls` and of its tasks.

    `preset_utils.register_presets`, meant for KerasHub's own presets. Written for KerasHub 0.32.

    Args:
        presets: for each name `metadata`, and where its files are: `kaggle_handle`, which may be
            a local folder.
        backbone_cls: the class.
    """
    preset_utils.register_presets(presets, backbone_cls)


def check_file_exists(preset: str, path: str) -> bool:
    """Whether a preset, by name, folder or handle, has a file.

    `preset_utils.check_file_exists`. Written for KerasHub 0.32.
    """
    return preset_utils.check_file_exists(preset, path)


def load_json(preset: str, path: str) -> dict[str, Any]:
    """A JSON file of a preset, by name, folder or handle.

    `preset_utils.load_json`. Written for KerasHub 0.32.
    """
    return preset_utils.load_json(preset, path)


def ask_for_loader(find: Callable[[str], preset_utils.PresetLoader | None]) -> None:
    """Makes every `from_preset` of KerasHub ask `find` first who loads a preset.

    `get_preset_loader`, replaced wherever KerasHub has imported it, since there is no hook.
    Written for KerasHub 0.32.

    Args:
        find: returns a loader for a preset, or `None` to leave it to KerasHub.
    """
    original = preset_utils.get_preset_loader
    if getattr(original, "asks", None) is find:
        return

    def get_preset_loader(preset):
        loader = find(preset)
        return original(preset) if loader is None else loader

    vars(get_preset_loader)["asks"] = find
    for name, module in list(sys.modules.items()):
        if name.startswith("keras_hub.") and vars(module).get("get_preset_loader") is original:
            vars(module)["get_preset_loader"] = get_preset_loader


def load_task(cls: type, backbone_cls: type, preset: str, load_weights: bool, **kwargs):
    """`cls.from_preset` for a preset in KerasHub's format with any backbone of `backbone_cls`.

    KerasHub's own takes a task for backbones of one class alone. `KerasPresetLoader`. Written for
    KerasHub 0.32.
    """
    loader = _loader(cls, backbone_cls, preset)
    # As there: a classifier for other classes has weights of its own to learn.
    return loader.load_task(cls, load_weights, "num_classes" not in kwargs, **kwargs)


def load_tokenizer(cls: type, backbone_cls: type | tuple[type, ...], preset: str, **kwargs):
    """`cls.from_preset` of a tokenizer, as `load_task`, with any `dtype`.

    KerasHub keeps the dtype that was saved. Written for KerasHub 0.32.
    """
    loader = _loader(cls, backbone_cls, preset)
    dtype = kwargs.pop("dtype", None)
    tokenizer = loader.load_tokenizer(cls, **kwargs)
    if dtype is not None:
        tokenizer.dtype_policy = keras.DTypePolicy(dtype)
    return tokenizer


def load_backbone(cls: type, preset: str, load_weights: bool, **kwargs):
    """`cls.from_preset` of a backbone, also of one that `ask_for_loader` tells of another class.

    `check_config_class`. Written for KerasHub 0.32.
    """
    loader = preset_utils.get_preset_loader(preset)
    received = preset_utils.check_config_class(loader.config)
    if not issubclass(received, cls):
        raise ValueError(
            f"{preset} is a {received.__name__}, not a {cls.__name__}: call `from_preset` of that "
            "class."
        )
    return loader.load_backbone(received, load_weights, **kwargs)


def load_preprocessor(cls: type, backbone_cls: type, preset: str, **kwargs):
    """`cls.from_preset` of a preprocessor, as `load_task`. Written for KerasHub 0.32."""
    return _loader(cls, backbone_cls, preset).load_preprocessor(cls, **kwargs)


def _loader(cls: type, backbone_cls: type | tuple[type, ...], preset: str):
    loader = preset_utils.get_preset_loader(preset)
    received = loader.check_backbone_class()
    if not issubclass(received, backbone_cls):
        raise ValueError(
            f"{cls.__name__} has no place for the backbone of {preset}, a {received.__name__}."
        )
    return loader
