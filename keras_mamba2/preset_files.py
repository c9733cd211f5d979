"""From the name of a preset to local files, checked before anything is loaded."""

import difflib
import fnmatch
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from keras_mamba2 import hub
from keras_mamba2.atomic_files import clean_up

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
SOURCES_FILE = "sources.json"
BACKBONE_NAMES = ("keras_mamba2>Mamba2Backbone", "keras_mamba2>Mamba2HybridBackbone")
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"

# Of each list the first that is there is taken, with the shards that belong to an index.
KERAS_WEIGHTS = ("model.weights.h5", "model.weights.json")
CHECKPOINT_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
SHARDS = {
    "model.weights.json": "model_*.weights.h5",
    "model.safetensors.index.json": "model-*.safetensors",
    "pytorch_model.bin.index.json": "pytorch_model-*.bin",
}
KERAS_PARTS = ("task.json", "task.weights.h5", "preprocessor.json", "metadata.json")
KERAS_TOKENIZER = ("tokenizer.json", "assets/tokenizer/tokenizer.json")
CHECKPOINT_TOKENIZER = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


def named_presets() -> dict[str, pathlib.Path]:
    """The folders of the presets that this package knows by name."""
    package = pathlib.Path(__file__).parent
    # Inside the package once installed, beside it in a source checkout.
    for folder in (package / "presets", package.parent / "presets"):
        if folder.is_dir():
            return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}
    return {}


class Preset:
    """The files of a preset, fetched when they are asked for.

    A preset is in KerasHub's format, or a checkpoint of transformers or state-spaces. One that
    is known by name may have its files elsewhere: its `sources.json` says where.

    Args:
        name: the name of a preset, a local folder, or a handle `hf://user/name`.

    Raises:
        ValueError: for an unknown name, and a folder or repository without `config.json`.
    """

    def __init__(self, name):
        self.name = str(name)
        self.sources: dict[str, Any] = {}
        if self.name.startswith(hub.PREFIX):
            self.folder = hub.fetch(self.name, lambda names: _present([CONFIG_FILE], names))
        else:
            self.folder = _local_folder(self.name)
            if (self.folder / SOURCES_FILE).is_file():
                self.sources = read_json(self.folder / SOURCES_FILE)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / CONFIG_FILE)

    @property
    def is_checkpoint(self) -> bool:
        """Whether this is a checkpoint of another library, to be converted."""
        return "registered_name" not in self.config

    def weights_folder(self) -> pathlib.Path:
        """A folder with the configuration and the weights of a checkpoint."""
        if "weights" in self.sources:
            return Preset(self.sources["weights"]).weights_folder()
        return self._fetch(lambda names: [CONFIG_FILE, *_weights(CHECKPOINT_WEIGHTS, names)])

    def tokenizer_folder(self) -> pathlib.Path:
        """A folder with the tokenizer of a checkpoint, if it has one, and how it is talked to."""
        if "tokenizer" in self.sources:
            return Preset(self.sources["tokenizer"]).tokenizer_folder()

        def choose(names):
            wanted = (CONFIG_FILE, *CHECKPOINT_TOKENIZER)
            return [name for pattern in wanted for name in fnmatch.filter(names, pattern)]

        return self._fetch(choose)

    def keras_folder(self, weights: bool = True, tokenizer: bool = True) -> str:
        """A folder in KerasHub's format. What will be read of it is there, and is sound."""

        def choose(names):
            parts = [name for name in (*KERAS_PARTS, *KERAS_TOKENIZER) if name in names]
            return [CONFIG_FILE, *parts, *(_weights(KERAS_WEIGHTS, names) if weights else [])]

        folder = self._fetch(choose)
        check_folder(folder, weights, tokenizer)
        return str(folder)

    def _fetch(self, choose: hub.Choice) -> pathlib.Path:
        return hub.fetch(self.name, choose) if self.name.startswith(hub.PREFIX) else self.folder


def adapter_folder(name) -> pathlib.Path:
    """A folder with the files of a PEFT adapter: a local one, or from `hf://user/name`."""

    def choose(names):
        return [*_present([ADAPTER_CONFIG_FILE], names), *_weights(ADAPTER_WEIGHTS, names)]

    if str(name).startswith(hub.PREFIX):
        return hub.fetch(str(name), choose)
    folder = pathlib.Path(name)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder. An adapter on the Hugging Face hub is written "
            "'hf://user/name'."
        )
    try:
        choose([file.name for file in folder.iterdir()])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return folder


def is_foreign(preset) -> bool:
    """Whether only KerasHub knows where `preset` lies: `kaggle://`, `gs://`, `modelscope://`."""
    return "://" in str(preset) and not str(preset).startswith(hub.PREFIX)


def _local_folder(name: str) -> pathlib.Path:
    known = named_presets()
    folder = known.get(name, pathlib.Path(name))
    if not folder.is_dir():
        clean_up(folder)  # it may be one that a killed process was about to replace
    if not folder.is_dir():
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise ValueError(
            f"Unknown preset {name!r}: neither the name of a preset nor a local folder. "
            f"Known names: {', '.join(known)}."
            + (f" Did you mean {near[0]!r}?" if near else "")
            + " A preset on the Hugging Face hub is written 'hf://user/name'."
        )
    return folder


def _present(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"Missing: {', '.join(missing)}. Present: {', '.join(sorted(names))}.")
    return list(wanted)


def _weights(kinds: Sequence[str], names: Sequence[str]) -> list[str]:
    """The weights among the files `names`, of the first kind that is there."""
    for kind in kinds:
        if kind in names:
            return [kind, *fnmatch.filter(names, SHARDS[kind])] if kind in SHARDS else [kind]
    raise ValueError(f"No weights. Expected one of: {', '.join(kinds)}.")


def check_folder(folder: pathlib.Path, weights: bool = True, tokenizer: bool = True) -> None:
    """Raises a `ValueError` that names the file, unless `folder` is a preset of this package."""
    config = read_json(folder / CONFIG_FILE)
    name = config.get("registered_name")
    if name not in BACKBONE_NAMES:
        raise ValueError(
            f"{folder / CONFIG_FILE} is not the configuration of a Mamba2Backbone. "
            f"Expected: registered_name={BACKBONE_NAMES[0]!r}, or {BACKBONE_NAMES[1]!r} of a "
            f"hybrid. Received: {name!r}"
        )
    if weights:
        check_weights(folder)
    if tokenizer:
        for file in KERAS_TOKENIZER:
            read_json(folder / file)


def check_weights(folder: pathlib.Path) -> None:
    present = [folder / file for file in KERAS_WEIGHTS if (folder / file).is_file()]
    if not present:
        raise ValueError(f"{folder / KERAS_WEIGHTS[0]} is missing.")
    if present[0].suffix == ".json":
        shards = read_json(present[0]).get("weight_map", {}).values()
        # The shards of a variable: one name, or a list where it is cut over several.
        names = sorted({n for s in shards for n in ([s] if isinstance(s, str) else s)})
        files = [folder / name for name in names]
    else:
        files = present[:1]
    for file in files:
        check_hdf5(file)


def check_hdf5(file: pathlib.Path) -> None:
    """Raises unless `file` is a whole HDF5 file: an open one tells its own size."""
    import h5py

    if not file.is_file():
        raise ValueError(f"{file} is missing.")
    with file.open("rb") as stream:
        if stream.read(len(HDF5_SIGNATURE)) != HDF5_SIGNATURE:
            raise ValueError(f"{file} is not a weights file in HDF5 format.")
    try:
        h5py.File(file, "r").close()
    except OSError as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error


def read_json(file: pathlib.Path) -> dict:
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is truncated or not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object. Received: {type(value).__name__}")
    return value
