"""Writing safetensors, with the error of a disk that is full or gone."""

import pathlib
from collections.abc import Mapping

import numpy as np


def save_tensors(file, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes the file of safetensors at the path `file`.

    Raises:
        OSError: that names it. The library's own error is none, so that nobody would catch it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(dict(tensors), file, dict(metadata))
    except SafetensorError as error:
        name = pathlib.Path(file).name
        raise OSError(f"{name} could not be written: {error}") from error
