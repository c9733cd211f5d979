"""What Keras leaves out of a file of weights: LoRA adapters, and the weights that they adapt.

Keras writes such a layer with its adapter merged, and reads that as the weights adapted. Here all
variables of such layers are in a file of their own, one of them in memory at a time.
"""

import pathlib
import zipfile
from collections.abc import Iterator

import keras
import ml_dtypes
import numpy as np

from keras_mamba2._compat.keras_layers import flatten_layers

FILE = "adapters.npz"
BITS = np.dtype("uint16")  # which no variable of Keras' layers has


def write(model: keras.Model, folder: pathlib.Path) -> None:
    """Writes the values into the backup `folder`, if there are any."""
    variables = _variables(model)
    if not variables:
        return
    with zipfile.ZipFile(folder / FILE, "w") as file:
        for name, variable in variables.items():
            value = keras.ops.convert_to_numpy(variable)
            if variable.dtype == "bfloat16":  # files of NumPy have only its bits
                value = value.view(BITS)
            with file.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, value, allow_pickle=False)


def check(model: keras.Model, folder: pathlib.Path) -> None:
    """Raises for a file that is damaged, or of a model with other adapters. Changes nothing.

    Raises:
        ValueError: that names the folder or the file.
    """
    variables = _variables(model)
    expected = {name: tuple(variable.shape) for name, variable in variables.items()}
    stored = {name: value.shape for name, value in _stored(folder / FILE)}
    if stored != expected:
        raise ValueError(
            f"The backup in {folder} is of a model with {_described(stored)}, this one has "
            f"{_described(variables)}. Call `enable_lora` as before the backup was made; one "
            "of Keras, or of an earlier version, has adapters merged and cannot be restored."
        )


def assign(model: keras.Model, folder: pathlib.Path) -> None:
    """Assigns the values in the backup `folder`, of which `check` has found no fault."""
    variables = _variables(model)
    for name, value in _stored(folder / FILE):
        # By what was stored: a model may go on in another dtype.
        value = value.view(ml_dtypes.bfloat16) if value.dtype == BITS else value
        variables[name].assign(value)


def _variables(model: keras.Model) -> dict[str, keras.Variable]:
    """By the number of the layer, since paths may be the same, and by their own names."""
    return {
        f"{i}.{j}.{variable.name}": variable
        for i, layer in enumerate(flatten_layers(model))
        if getattr(layer, "lora_enabled", False)
        for j, variable in enumerate(layer.weights)
    }


def _stored(file: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    if not file.exists():
        return
    try:
        with np.load(file) as stored:
            for name in stored.files:
                yield name, stored[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error


def _described(names) -> str:
    count = sum(name.endswith("lora_kernel_a") for name in names)
    return f"{count} LoRA adapters" if count else "no LoRA adapters"
