"""From the name of a preset to local files, checked before anything is loaded."""

import contextlib
import difflib
import fnmatch
import functools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from keras_mamba2 import hub
from keras_mamba2.atomic_files import clean_up
from keras_mamba2.untrusted import LARGEST_TOKENIZER
from keras_mamba2.untrusted import check_file
from keras_mamba2.untrusted import is_folder
from keras_mamba2.untrusted import read_json as read_json
from keras_mamba2.untrusted import shortened
from keras_mamba2.untrusted import some

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
TASK_FILE, PREPROCESSOR_FILE = "task.json", "preprocessor.json"
METADATA_FILE, SOURCES_FILE = "metadata.json", "sources.json"
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
BACKBONE_NAMES = ("keras_mamba2>Mamba2Backbone", "keras_mamba2>Mamba2HybridBackbone")
LONGEST_NAME = 100  # that is compared with known ones
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"

# Of each list the first that is there is taken, with the shards that an index names.
KERAS_WEIGHTS = ("model.weights.h5", "model.weights.json")
CHECKPOINT_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TASK_WEIGHTS = "task.weights.h5"
KERAS_PARTS = (TASK_FILE, TASK_WEIGHTS, PREPROCESSOR_FILE, METADATA_FILE)
KERAS_TOKENIZER = ("tokenizer.json", "assets/tokenizer/tokenizer.json")
CHECKPOINT_TOKENIZER = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
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
            found = sorted(folder.glob(f"*/{METADATA_FILE}"))
            return {path.parent.name: path.parent for path in found}
    return {}


class Preset:
    """The files of a preset, fetched when they are asked for.

    A preset is in KerasHub's format, or a checkpoint of transformers or state-spaces. One that
    is known by name may have its files elsewhere: its `sources.json` says where, also where its
    architecture is, if it has no `config.json`.

    Args:
        name: the name of a preset, a local folder, or a handle `hf://user/name`.

    Raises:
        ValueError: for an unknown name, and a folder or repository without `config.json`.
    """

    def __init__(self, name):
        self.name = str(name)
        self.sources: dict[str, str] = {}
        if self.name.startswith(hub.PREFIX):
            self.folder = hub.fetch(self.name, lambda names: _present([CONFIG_FILE], names))
        else:
            self.folder = _local_folder(self.name)
            # Of our own presets alone: another's could name itself, or what was not asked for.
            if self.name in named_presets() and (self.folder / SOURCES_FILE).is_file():
                self.sources = read_sources(self.folder / SOURCES_FILE)
                if not (self.folder / CONFIG_FILE).is_file():  # it has the checkpoint's own
                    self.folder = Preset(self.sources["weights"]).folder

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
        return self._fetch(lambda names: [CONFIG_FILE, *self._weights(CHECKPOINT_WEIGHTS, names)])

    def tokenizer_folder(self) -> pathlib.Path:
        """A folder with the tokenizer of a checkpoint, if it has one, and how it is talked to."""
        if "tokenizer" in self.sources:
            return Preset(self.sources["tokenizer"]).tokenizer_folder()

        def choose(names):
            wanted = (CONFIG_FILE, *CHECKPOINT_TOKENIZER)
            return [name for pattern in wanted for name in fnmatch.filter(names, pattern)]

        return self._fetch(choose)

    def keras_folder(
        self,
        weights: bool = True,
        tokenizer: bool = True,
        names: Sequence[str] = BACKBONE_NAMES,
        bare: bool = False,
    ) -> str:
        """A folder in KerasHub's format. What will be read of it is there, and is sound.

        Args:
            weights: bool, whether the weights will be read.
            tokenizer: bool, whether the tokenizer will be read.
            names: sequence of strings, the registered names of which the model has one.
            bare: bool, whether a task that was saved without a preprocessor needs no tokenizer.
        """

        def choose(files):
            parts = [file for file in (*KERAS_PARTS, *KERAS_TOKENIZER) if file in files]
            return [CONFIG_FILE, *parts, *(self._weights(KERAS_WEIGHTS, files) if weights else [])]

        folder = self._fetch(choose)
        tokenizer = tokenizer and not (bare and _is_without_preprocessor(folder))
        check_folder(folder, weights, tokenizer, names)
        return str(folder)

    def _weights(self, kinds: Sequence[str], names: Sequence[str]) -> list[str]:
        """The weights among the files `names`, with the shards that an index names."""
        kind = _first(kinds, names)
        if not kind.endswith(".json"):
            return [kind]
        shards = read_json(self._fetch(lambda _: [kind]) / kind).get("weight_map")
        # What is no name is refused by the reader.
        named = _shards_of(shards) if isinstance(shards, dict) else []
        return [kind, *sorted({name for name in named if isinstance(name, str)} & set(names))]

    def _fetch(self, choose: hub.Choice) -> pathlib.Path:
        return hub.fetch(self.name, choose) if self.name.startswith(hub.PREFIX) else self.folder


def adapter_folder(name) -> pathlib.Path:
    """A folder with the files of a PEFT adapter: a local one, or from `hf://user/name`."""

    def choose(names):
        return [*_present([ADAPTER_CONFIG_FILE], names), _first(ADAPTER_WEIGHTS, names)]

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
    if not name:
        raise ValueError(f"The name of a preset is empty. Known names: {', '.join(known)}.")
    folder = known.get(name, pathlib.Path(name))
    if not is_folder(folder):
        with contextlib.suppress(ValueError):  # a name that no path can have
            clean_up(folder)  # it may be one that a killed process was about to replace
    if not is_folder(folder):
        near = difflib.get_close_matches(name[:LONGEST_NAME], known, n=1, cutoff=0.4)
        raise ValueError(
            f"Unknown preset {shortened(name)!r}: neither the name of a preset nor a local folder. "
            f"Known names: {', '.join(known)}."
            + (f" Did you mean {near[0]!r}?" if near else "")
            + " A preset on the Hugging Face hub is written 'hf://user/name'."
        )
    return folder


def _present(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"Missing: {some(missing)}. Present: {some(sorted(names))}.")
    return list(wanted)


def _first(kinds: Sequence[str], names: Sequence[str]) -> str:
    """The first of the kinds of weights that is among the files `names`."""
    found = next((kind for kind in kinds if kind in names), None)
    if found is None:
        raise ValueError(f"No weights. Expected one of: {', '.join(kinds)}.")
    return found


def check_folder(
    folder: pathlib.Path,
    weights: bool = True,
    tokenizer: bool = True,
    names: Sequence[str] = BACKBONE_NAMES,
) -> None:
    """Raises a `ValueError` that names the file, unless `folder` is a preset of this package."""
    name = read_json(folder / CONFIG_FILE).get("registered_name")
    if name not in names:
        classes = " or a ".join(known.split(">")[-1] for known in names)
        raise ValueError(
            f"{folder / CONFIG_FILE} is not the configuration of a {classes}. "
            f"Received: registered_name={shortened(name)!r}"
        )
    check_serialized(folder / CONFIG_FILE)
    for file in (TASK_FILE, PREPROCESSOR_FILE):
        if os.path.lexists(folder / file):
            check_serialized(folder / file)
    if weights:
        for file in weights_files(folder):
            check_hdf5(file)
    if tokenizer:
        check_serialized(folder / KERAS_TOKENIZER[0])
        read_json(folder / KERAS_TOKENIZER[1], LARGEST_TOKENIZER)


def _is_without_preprocessor(folder: pathlib.Path) -> bool:
    """Whether a task was saved that has none, and so no tokenizer."""
    if not os.path.lexists(folder / TASK_FILE):
        return False
    config = read_json(folder / TASK_FILE).get("config")
    return isinstance(config, dict) and config.get("preprocessor", "missing") is None


def check_serialized(file: pathlib.Path) -> None:
    """Raises unless `file` has what Keras writes of an object: its class and its configuration."""
    value = read_json(file)
    for key, kind in (("registered_name", str), ("config", dict)):
        if not isinstance(value.get(key), kind):
            raise ValueError(
                f"{file} is not the configuration of an object of Keras. Expected: `{key}`. "
                f"Received: {key}={shortened(value.get(key))}"
            )


def weights_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The HDF5 files of a preset, or of weights that `save_weights` wrote.

    Raises:
        ValueError: that names the file, if there are none, one is missing, or lies elsewhere.
    """
    if is_folder(path):
        present = [path / file for file in KERAS_WEIGHTS if os.path.lexists(path / file)]
        if not present:
            raise ValueError(f"{path / KERAS_WEIGHTS[0]} is missing.")
        path = present[0]
    if path.suffix != ".json":
        check_file(path)
        return [path]
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no `weight_map`.")
    names = _shards_of(weight_map)
    for name in names:
        if not isinstance(name, str) or not name or pathlib.Path(name).name != name:
            raise ValueError(
                f"{path} must name files beside it. Received: weight_map with {shortened(name)!r}"
            )
    files = [path.with_name(name) for name in sorted(set(names))]
    for file in files:
        check_file(file)
    return files


def _shards_of(weight_map: dict[str, Any]) -> list[Any]:
    """The shards of all variables: of each one name, or a list where it is cut over several."""
    return [n for s in weight_map.values() for n in (s if isinstance(s, list) else [s])]


def check_hdf5(file: pathlib.Path) -> None:
    """Raises unless `file` is a whole HDF5 file: an open one tells its own size."""
    import h5py

    check_file(file)
    with file.open("rb") as stream:
        if stream.read(len(HDF5_SIGNATURE)) != HDF5_SIGNATURE:
            raise ValueError(f"{file} is not a weights file in HDF5 format.")
    try:
        h5py.File(file, "r").close()
    except OSError as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error


def read_sources(file: pathlib.Path) -> dict[str, str]:
    """The handles of a preset's `weights` and `tokenizer`, each with its revision if it has one.

    The optional `revision` maps them to commits of their repositories. A branch or a tag is
    refused: both can be moved to other files.
    """
    sources = read_json(file)
    revisions = sources.pop("revision", {})
    if not isinstance(revisions, dict):
        raise ValueError(
            f'{file}: `revision` maps sources to commits, as {{"weights": "0123..."}}. '
            f"Received: revision={revisions!r}"
        )
    for part, revision in revisions.items():
        if part not in ("weights", "tokenizer") or "@" in sources.get(part, "@"):
            raise ValueError(
                f"{file}: `revision` is for `weights` and `tokenizer`, if their handles are there "
                f"and have no revision of their own. Received: {part}={sources.get(part)!r}"
            )
        if not COMMIT_HASH.fullmatch(str(revision)):
            raise ValueError(
                f"{file}: a revision is the full hash of a commit, 40 hexadecimal digits. "
                f"Received: {part}={revision!r}"
            )
        sources[part] = f"{sources[part]}@{revision}"
    return sources
