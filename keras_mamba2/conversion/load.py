"""From the files of a checkpoint into the variables of a backbone."""

import pathlib
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import keras
import numpy as np

from keras_mamba2._compat.keras_variables import has_value
from keras_mamba2.conversion.deferred import set_value
from keras_mamba2.conversion.names import EMBEDDING
from keras_mamba2.conversion.names import HEAD
from keras_mamba2.conversion.names import Layout
from keras_mamba2.conversion.names import spelling_of
from keras_mamba2.conversion.names import weight_name
from keras_mamba2.conversion.progress import progress
from keras_mamba2.conversion.readers import read_tensors
from keras_mamba2.conversion.stored_tensor import StoredTensor
from keras_mamba2.conversion.stored_tensor import numpy_dtype

# Embeddings are padded to a multiple of 8, 16, 64 or 128 rows. More than this is another model.
MOST_PADDING_ROWS = 256
ROWS_AT_ONCE = 1024
STRIPE = 64  # numbers


class Target(NamedTuple):
    """A variable, and how the weight that fills it is laid out."""

    variable: keras.Variable
    layout: Layout


def load_weights(backbone, folder) -> None:
    """Fills the variables of a built `Mamba2Backbone` from the checkpoint in `folder`.

    One tensor is read at a time and cast to its variable's dtype. Everything is checked before
    the first variable changes. An embedding with a few rows less than the model's vocabulary is
    padded with zeros.

    Warns:
        UserWarning: that counts the NaN weights, if there are any.

    Raises:
        ValueError: if a weight in the files is not used or a variable not filled (both sets are
            listed), for shapes that differ, and as `readers.read_tensors`.
    """
    folder = pathlib.Path(folder)
    tensors = read_tensors(folder)
    targets = _targets(backbone, spelling_of(tensors))
    tensors = _without_tied_head(folder, tensors, targets)
    _check_names(folder, tensors, targets)
    _check_shapes(folder, tensors, targets)
    nbytes = sum(tensor.end - tensor.offset for tensor in tensors.values())
    nans = {
        name: _assign(tensors[name], targets[name])
        for name in progress(targets, "Loading weights", nbytes)
    }
    nans = {name: count for name, count in nans.items() if count}
    if nans:
        warnings.warn(
            f"The weights in {folder} hold {sum(nans.values())} NaN in {len(nans)} tensors: "
            + ", ".join(f"{name} ({count})" for name, count in nans.items()),
            stacklevel=2,
        )


def _targets(backbone, spelling: str) -> dict[str, Target]:
    """Where each weight goes, by its name in the file."""
    targets = {}
    for variable in backbone.weights:
        name, layout = weight_name(variable.path, spelling)
        targets[name] = Target(variable, layout)
    return targets


def _without_tied_head(
    folder: pathlib.Path, tensors: Mapping[str, StoredTensor], targets: Mapping[str, Target]
) -> dict[str, StoredTensor]:
    """Drops the head if the model has none and it is the embedding once more."""
    tensors = dict(tensors)
    embedding = tensors.get(EMBEDDING[spelling_of(tensors)])
    if HEAD in targets or HEAD not in tensors or embedding is None:
        return tensors
    if not _equal(tensors.pop(HEAD), embedding):
        raise ValueError(
            f"{folder}: {HEAD} differs from the embedding, but the model ties the two. Its "
            "configuration should say tie_word_embeddings=False."
        )
    return tensors


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are the same bit for bit, NaN included."""
    if a == b:
        return True  # one tensor in one file
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    a, b = a.read(), b.read()
    rows = range(0, len(a), ROWS_AT_ONCE)
    return all(a[i : i + ROWS_AT_ONCE].tobytes() == b[i : i + ROWS_AT_ONCE].tobytes() for i in rows)


def _check_names(
    folder, tensors: Mapping[str, StoredTensor], targets: Mapping[str, Target]
) -> None:
    unused, missing = sorted(set(tensors) - set(targets)), sorted(set(targets) - set(tensors))
    if unused or missing:
        raise ValueError(
            f"The weights in {folder} are not those of the model.\n"
            f"In the files, without a place in the model: {', '.join(unused) or 'none'}\n"
            f"In the model, missing in the files: {', '.join(missing) or 'none'}"
        )


def _check_shapes(
    folder, tensors: Mapping[str, StoredTensor], targets: Mapping[str, Target]
) -> None:
    problems = []
    for name, (variable, layout) in targets.items():
        actual, expected = tensors[name].shape, layout.file_shape(variable.shape)
        if actual != expected and not _lacks_padding(name, actual, expected):
            problems.append(
                f"{name}: {actual} in {tensors[name].file.name}, {expected} in the model "
                f"({variable.path}){_about_vocabulary(name, actual, expected)}"
            )
    if problems:
        raise ValueError(f"Shapes in {folder} differ from the model's.\n" + "\n".join(problems))


def _is_vocabulary(name: str) -> bool:
    return name == HEAD or name in EMBEDDING.values()


def _lacks_padding(name: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if not _is_vocabulary(name) or actual[1:] != expected[1:]:
        return False
    return 0 < expected[0] - actual[0] < MOST_PADDING_ROWS


def _about_vocabulary(name: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if not _is_vocabulary(name) or actual[1:] != expected[1:] or actual[0] < expected[0]:
        return ""
    return (
        f". The file has {actual[0] - expected[0]} rows more, which may be padding: build the "
        f"model with vocabulary_size={actual[0]}"
    )


def _assign(tensor: StoredTensor, target: Target) -> int:
    """Fills one variable and returns how many NaN it got."""
    variable, layout = target
    _free(variable)
    # Memory of its own, which a backend may take over; the file's must not be.
    value = np.zeros(variable.shape, numpy_dtype(variable.dtype))
    _copy(layout.to_variable(tensor.read()), value)
    set_value(variable, value)
    return int(np.count_nonzero(np.isnan(value)))


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies into the beginning of `target`, stripe by stripe.

    A transposed matrix has the numbers of a row far apart. In stripes, what the processor fetches
    for one row is still at hand for the next.
    """
    target = target[tuple(map(slice, source.shape))]
    for i in range(0, source.shape[-1], STRIPE):
        target[..., i : i + STRIPE] = source[..., i : i + STRIPE]


def _free(variable: keras.Variable) -> None:
    """Gives up the memory of a value that is about to be replaced, before the new one takes any."""
    if (
        has_value(variable)
        and keras.config.backend() == "jax"
        and len(variable.value.sharding.device_set) == 1
    ):
        variable.value.delete()
