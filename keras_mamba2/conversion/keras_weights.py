"""Weights in Keras' files, loaded whole or not at all.

Keras takes what it finds: a file with more layers than the model, or with NaN, loads in silence.
Here every tensor of a file has its place, every variable is filled, and all numbers are finite,
before a value of the model changes.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np

from keras_mamba2._compat.keras_layers import flatten_layers
from keras_mamba2._compat.keras_saving import saved_tensors
from keras_mamba2._compat.keras_variables import has_value
from keras_mamba2.conversion.deferred import initialize_the_rest
from keras_mamba2.conversion.deferred import set_value
from keras_mamba2.conversion.soundness import non_finite
from keras_mamba2.conversion.soundness import refuse_non_finite
from keras_mamba2.conversion.stored_tensor import numpy_dtype
from keras_mamba2.host.finite import is_finite
from keras_mamba2.preset_files import weights_files
from keras_mamba2.untrusted import shortened
from keras_mamba2.untrusted import some

ENDINGS = (".weights.h5", ".weights.json")
# What is no weight, as the state of the optimizer, a model may have or not, whatever the file has.
WEIGHT = re.compile(r"layers/(?!(?:.*/)?seed_generator/).*")
BLOCK = re.compile(r"(?:.*/)?layers/((?:mamba2|hybrid|fed)_block(?:_\d+)?)/.*")


class WholeWeights:
    """A model whose `load_weights` takes a file whole, or not at all."""

    backbone: keras.Model  # of a task

    def load_weights(self, filepath, skip_mismatch: bool = False, **kwargs) -> None:
        """As `keras.Model.load_weights`, but a file must be the model's own, and sound.

        Raises:
            ValueError: that names the file, before a value changes: if a tensor in it has no
                place in the model, a variable is not in it, shapes differ, or a number is not
                finite. With `skip_mismatch` Keras loads what fits.
        """
        if skip_mismatch or not str(filepath).endswith(ENDINGS):
            super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)
        elif not load(self, filepath):
            super().load_weights(filepath, **kwargs)


class WholeTaskWeights(WholeWeights):
    """A task, whose own weights may lie in a file beside the backbone's."""

    def load_task_weights(self, filepath) -> None:
        """As `keras_hub.models.Task.load_task_weights`, and as `load_weights`."""
        if not load(self, filepath, list(flatten_layers(self.backbone))):
            super().load_task_weights(filepath)


def load(model, filepath, skipped: Sequence[Any] = ()) -> bool:
    """Fills the variables of `model` from a file of Keras, but for those of the layers `skipped`.

    Returns:
        Whether it did so. If not, the model has more to load than variables, such as adapters
        that are merged when it is saved; the file is checked then, and Keras loads it.

    Raises:
        ValueError: as `WholeWeights.load_weights`.
    """
    expected = saved_tensors(model, skipped)
    replaced, bad = [], []
    with opened(weights_files(pathlib.Path(filepath))) as stored:
        _check(filepath, stored, expected)
        variables = {name: expected[name] for name in stored if name in expected}
        can_fill = all(isinstance(variable, keras.Variable) for variable in variables.values())
        for name, variable in variables.items():
            is_checked = _is_weight(name) and _kind(_stored_dtype(stored[name])) == "float"
            if not (can_fill or is_checked):
                continue
            value = _read(stored[name], getattr(variable, "dtype", "float32"))
            if not is_finite(value):
                bad.append(non_finite(name, value))
            elif can_fill and has_value(variable):
                replaced.append((variable, value))
            elif can_fill:
                set_value(variable, value)
    refuse_non_finite(filepath, bad)
    for variable, value in replaced:
        set_value(variable, value)
    if can_fill:
        _mark_as_calibrated(model)
    else:
        initialize_the_rest(model.variables)  # Keras assigns to values
    return can_fill


def check_number_of_blocks(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Raises if a preset says another number of blocks than its weights have.

    A model of a billion layers would be built before anybody looked at the weights.
    """
    with opened(weights_files(folder)) as stored:
        blocks = {match[1] for name in stored if (match := BLOCK.fullmatch(name))}
    said = len(config["blocks"]) if "blocks" in config else config.get("num_layers")
    if said != len(blocks):
        raise ValueError(
            f"{folder}: config.json says {shortened(said)} blocks, the weights have {len(blocks)}."
        )


@contextlib.contextmanager
def opened(files: Iterable[pathlib.Path]) -> Iterator[dict[str, h5py.Dataset]]:
    """The tensors in HDF5 files by name.

    Raises:
        ValueError: that names the file, if it is damaged, has links to other files, or says that
            it holds more than it does.
    """
    tensors: dict[str, h5py.Dataset] = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            if name in tensors:
                raise ValueError(f"it holds {name}, as another file of the same weights does")
            _check_plain(name, item)
            tensors[name] = item

    with contextlib.ExitStack() as stack:
        for path in files:
            with _damage_named(path):
                stack.enter_context(h5py.File(path)).visititems(visit)
        yield tensors


def _check_plain(name: str, item: h5py.Dataset) -> None:
    is_plain = item.chunks is None and item.external is None and not item.is_virtual
    if not is_plain or item.id.get_storage_size() != item.size * item.dtype.itemsize:
        raise ValueError(f"its tensor {shortened(name)} is not stored as plain numbers")


def _stored_dtype(item: h5py.Dataset) -> np.dtype:
    is_bfloat16 = item.attrs.get("dtype") == "bfloat16" and item.dtype.itemsize == 2
    return np.dtype(ml_dtypes.bfloat16) if is_bfloat16 else item.dtype


def _read(item: h5py.Dataset, dtype) -> np.ndarray:
    with _damage_named(item.file.filename):
        value = np.asarray(item[()]).view(_stored_dtype(item))
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is refused
        return value.astype(numpy_dtype(keras.backend.standardize_dtype(dtype)), copy=False)


@contextlib.contextmanager
def _damage_named(path) -> Iterator[None]:
    try:
        yield
    # h5py has no error of its own: a damaged file can raise anything.
    except Exception as error:
        raise ValueError(f"{path} is truncated or damaged: {shortened(str(error))}") from error


def _check(filepath, stored: Mapping[str, h5py.Dataset], expected: Mapping[str, Any]) -> None:
    unused = sorted(name for name in set(stored) - set(expected) if _is_weight(name))
    missing = sorted(name for name in set(expected) - set(stored) if _is_weight(name))
    if unused or missing:
        raise ValueError(
            f"The weights in {filepath} are not those of the model.\n"
            f"In the file, without a place in the model: {some(unused)}\n"
            f"In the model, missing in the file: {some(missing)}"
        )
    problems = []
    for name in sorted(filter(_is_weight, set(stored) & set(expected))):
        if expected[name] is None:  # a scale, which Keras finds where it loads a quantized layer
            continue
        shapes = stored[name].shape, tuple(expected[name].shape)
        kinds = [_kind(dtype) for dtype in (_stored_dtype(stored[name]), expected[name].dtype)]
        if shapes[0] != shapes[1] or kinds[0] != kinds[1]:
            problems.append(
                f"{name}: {shapes[0]} {kinds[0]} in the file, {shapes[1]} {kinds[1]} in the model"
            )
    if problems:
        raise ValueError(f"{filepath} holds the weights of another model. {some(problems)}")


def _is_weight(name: str) -> bool:
    return WEIGHT.fullmatch(name) is not None


def _kind(dtype) -> str:
    """Floats can stand for each other; whole numbers of another size are another quantization."""
    name = dtype.name if isinstance(dtype, np.dtype) else keras.backend.standardize_dtype(dtype)
    return "float" if "float" in name and "float8" not in name else name


def _mark_as_calibrated(model) -> None:
    """What the layers of Keras do when they load weights that GPTQ or AWQ quantized."""
    for layer in flatten_layers(model):
        if getattr(layer, "quantization_mode", None) in ("gptq", "awq"):
            setattr(layer, f"is_{layer.quantization_mode}_calibrated", True)
