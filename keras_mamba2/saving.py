"""Saving over what was saved before: on disk is the old one or the new one, whole.

What is promised if the process is killed is said in `keras_mamba2/atomic_files.py`.
"""

import contextlib
import contextvars
import fnmatch
import itertools
import os
import pathlib
import shutil
from collections.abc import Iterator
from collections.abc import Sequence
from typing import ClassVar

import keras

from keras_mamba2._compat.keras_layers import flatten_layers
from keras_mamba2._compat.keras_saving import ask_to_overwrite
from keras_mamba2.atomic_files import atomic_file
from keras_mamba2.atomic_files import clean_up
from keras_mamba2.atomic_files import replaced_folder

# Names relative to a preset, as patterns of `fnmatch`: what KerasHub writes for each part.
BACKBONE_FILES = ("config.json", "metadata.json", "model.weights.*", "model_*.weights.h5")
TOKENIZER_FILES = ("tokenizer.json", "assets/tokenizer/*")
PREPROCESSOR_FILES = ("preprocessor.json", *TOKENIZER_FILES)
TASK_FILES = ("task.json", "task.weights.h5", *BACKBONE_FILES, *PREPROCESSOR_FILES)
# What people put beside them, and nobody here writes over.
CARD_FILES = ("README.md", "LICENSE", ".gitattributes")
# What Keras writes with `zipped=False`.
UNZIPPED_FILES = ("config.json", "metadata.json", "model.weights.h5", "assets/*")

# The temporary folder of the outermost `save_to_preset`: a task lets its parts write there too.
_preset_being_written: contextvars.ContextVar[pathlib.Path | None] = contextvars.ContextVar(
    "preset_being_written", default=None
)


def _check_is_whole(model) -> None:
    """Raises for weights that are still to come.

    Raises:
        ValueError: that names the layer.
    """
    for layer in flatten_layers(model) if isinstance(model, keras.Model) else ():
        if getattr(layer, "waits_for_calibration", False):
            raise ValueError(
                f"Layer {layer.path!r} has no quantized weights yet, since `quantize` with "
                f"mode={layer.quantization_mode!r} ended early. Load the model anew."
            )


class AtomicPreset:
    """An object whose `save_to_preset` replaces its part of a preset as a whole."""

    # Of what `save_to_preset` writes: patterns of names relative to the preset.
    preset_files: ClassVar[tuple[str, ...]] = TASK_FILES

    def save_to_preset(self, preset_dir, *args, **kwargs) -> None:
        """Writes a preset: as KerasHub does, but beside the old one, which it then replaces.

        Until the new preset is whole the old one is as it was, whatever happens. A task replaces
        all of it. A backbone, a tokenizer and a preprocessor replace their files, and keep those
        of other parts. `README.md`, `LICENSE` and `.gitattributes` stay.

        Args:
            preset_dir: the path of a folder: new, empty, or a preset.
            *args: as `max_shard_size` of `keras_hub.models.Task.save_to_preset`.
            **kwargs: likewise.

        Raises:
            ValueError: for a folder with files of something else in it, the current folder, and
                one where a file system is mounted.
        """
        if preset_dir == _preset_being_written.get():
            super().save_to_preset(preset_dir, *args, **kwargs)
            return
        _check_is_whole(self)
        kept = (*CARD_FILES, *(name for name in TASK_FILES if name not in self.preset_files))
        with _folder_of(preset_dir, self.preset_files, kept) as temporary:
            token = _preset_being_written.set(temporary)
            try:
                super().save_to_preset(temporary, *args, **kwargs)
            finally:
                _preset_being_written.reset(token)


class AtomicSave:
    """A model whose `save` writes a file or a folder that replaces the old one as a whole."""

    def save(self, filepath, overwrite: bool = True, zipped: bool | None = None, **kwargs):
        """See `keras.Model.save`. Until the new file is whole the old one is as it was."""
        _check_is_whole(self)
        ends = (".keras", ".h5", ".hdf5")
        is_path = isinstance(filepath, (str, os.PathLike)) and "://" not in str(filepath)
        # Keras says what is wrong with a name.
        if not is_path or str(filepath).endswith(ends) == (zipped is False):
            return super().save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)
        if not overwrite and os.path.exists(filepath) and not ask_to_overwrite(filepath):
            return None
        folder = zipped is False
        opened = _folder_of(filepath, UNZIPPED_FILES) if folder else atomic_file(filepath)
        with opened as temporary:
            return super().save(temporary, zipped=zipped, **kwargs)


@contextlib.contextmanager
def _folder_of(folder, written: Sequence[str], kept: Sequence[str] = ()) -> Iterator[pathlib.Path]:
    """A temporary folder, with the files `kept` of `folder` in it, which replaces it.

    Raises:
        ValueError: if `folder` has files that are neither `written` nor `kept`.
    """
    folder = pathlib.Path(os.path.realpath(folder))
    clean_up(folder)
    names = _names(folder)
    foreign = (name for name in names if not _is_one(name, (*written, *kept)))
    # Lazily: it may be a folder with millions of files.
    if some := list(itertools.islice(foreign, 5)):
        raise ValueError(
            f"{folder} has files in it that do not belong to what is saved, and would be lost, "
            f"such as {', '.join(sorted(some))}. Save to another folder."
        )
    names = list(_names(folder))
    with replaced_folder(folder) as temporary:
        for name in names:
            if not _is_one(name, written):
                _link(folder / name, temporary / name)
        yield temporary


def _names(folder: pathlib.Path) -> Iterator[str]:
    """Of all below `folder` but folders with something in them, relative to it."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            yield path.relative_to(folder).as_posix()


def _is_one(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    """Gives a file a second name, as a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
