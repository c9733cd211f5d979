"""What Keras leaves out of a file of weights: LoRA adapters, and the weights that they adapt."""

import pathlib
import zipfile
from typing import Any

import keras
import numpy as np

from keras_mamba2._compat.keras_layers import flatten_layers

FILE = "adapters.npz"


class AdapterValues:
    """The values of all variables in layers with an adapter, each to be assigned to its own.

    Keras writes such a layer with its adapter merged, and reads that as the weights adapted.

    Args:
        variables: of a model, by names that another such model has too.
        values: arrays, by the same names.
    """

    def __init__(self, variables: dict[str, keras.Variable], values: dict[str, Any]):
        self._variables = variables
        self._values = values

    @classmethod
    def of(cls, model: keras.Model) -> "AdapterValues":
        variables = _variables(model)
        return cls(variables, {name: _as_numpy(value) for name, value in variables.items()})

    @classmethod
    def read(cls, folder: pathlib.Path, model: keras.Model) -> "AdapterValues":
        """The values in the backup `folder`, for `model`. Changes nothing.

        Raises:
            ValueError: if the file is damaged, or the model has other adapters.
        """
        variables, values = _variables(model), _stored(folder / FILE)
        expected = {name: tuple(variable.shape) for name, variable in variables.items()}
        if {name: value.shape for name, value in values.items()} != expected:
            raise ValueError(
                f"The backup in {folder} is of a model with {_described(values)}, this one has "
                f"{_described(variables)}. Call `enable_lora` as before the backup was made; one "
                "of Keras, or of an earlier version, has adapters merged and cannot be restored."
            )
        return cls(variables, values)

    def write(self, folder: pathlib.Path) -> None:
        if self._values:
            np.savez(folder / FILE, **self._values)

    def assign(self) -> None:
        for name, variable in self._variables.items():
            variable.assign(self._values[name])


def _variables(model: keras.Model) -> dict[str, keras.Variable]:
    """By the number of the layer, since paths may be the same, and by their own names."""
    return {
        f"{i}.{j}.{variable.name}": variable
        for i, layer in enumerate(flatten_layers(model))
        if getattr(layer, "lora_enabled", False)
        for j, variable in enumerate(layer.weights)
    }


def _as_numpy(variable: keras.Variable) -> np.ndarray:
    value = keras.ops.convert_to_numpy(variable)
    # Files of NumPy have no bfloat16.
    return value.astype("float32") if variable.dtype == "bfloat16" else value


def _stored(file: pathlib.Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        with np.load(file) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error


def _described(names) -> str:
    count = sum(name.endswith("lora_kernel_a") for name in names)
    return f"{count} LoRA adapters" if count else "no LoRA adapters"
