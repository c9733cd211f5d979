"""From the files of a checkpoint into the variables of a backbone."""

import pathlib
import re
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np

from keras_mamba2._compat.keras_variables import has_value
from keras_mamba2.conversion.architectures import architecture_of
from keras_mamba2.conversion.architectures import names_in
from keras_mamba2.conversion.deferred import set_value
from keras_mamba2.conversion.names import BUFFERS
from keras_mamba2.conversion.names import Names
from keras_mamba2.conversion.names import Piece
from keras_mamba2.conversion.progress import progress
from keras_mamba2.conversion.readers import read_tensors
from keras_mamba2.conversion.soundness import check_floats
from keras_mamba2.conversion.soundness import checksums_compared
from keras_mamba2.conversion.soundness import non_finite
from keras_mamba2.conversion.soundness import refuse_non_finite
from keras_mamba2.conversion.stored_tensor import StoredTensor
from keras_mamba2.conversion.stored_tensor import numpy_dtype
from keras_mamba2.conversion.stored_tensor import same_bits
from keras_mamba2.host.finite import is_finite
from keras_mamba2.preset_files import CONFIG_FILE
from keras_mamba2.preset_files import read_json
from keras_mamba2.untrusted import some

# Embeddings are padded to a multiple of 8, 16, 64 or 128 rows. More than this is another model.
MOST_PADDING_ROWS = 256
STRIPE = 64  # numbers
MOST_SHOWN = 20  # problems in an error


class Target(NamedTuple):
    """A variable, and what fills it."""

    variable: keras.Variable
    pieces: list[Piece]


def load_weights(backbone, folder) -> None:
    """Fills the variables of a built backbone from the checkpoint in `folder`.

    One tensor is read at a time and cast to its variable's dtype. Everything is checked before
    the first value changes; a model that has values needs room for both meanwhile. An embedding
    with a few rows less than the model's vocabulary is padded with zeros.

    Raises:
        ValueError: if a weight in the files is not used or a variable not filled (both sets are
            listed), for shapes that differ, for weights that are not finite in the dtype of their
            variable, for a checksum that differs, and as `readers.read_tensors`.
    """
    folder = pathlib.Path(folder)
    tensors = read_tensors(folder)
    architecture = architecture_of(read_json(folder / CONFIG_FILE))
    names = names_in(architecture, backbone.get_config(), tensors)
    targets = [Target(variable, names.pieces(variable)) for variable in backbone.weights]
    tensors = _of_the_model(folder, tensors, targets, names)
    _check_names(folder, tensors, targets)
    _check_shapes(folder, tensors, targets, names)
    check_floats(folder, tensors)
    nbytes = sum(tensor.end - tensor.offset for tensor in tensors.values())
    replaced, bad = [], []
    with checksums_compared(tensors.values()):
        for target in progress(targets, "Loading weights", nbytes):
            value = _value(tensors, target)
            if not is_finite(value):
                bad.append(non_finite(some(sorted(_names([target])), 3), value))
            elif has_value(target.variable):
                replaced.append((target.variable, value))
            else:
                set_value(target.variable, value)
    refuse_non_finite(folder, bad)
    for variable, value in replaced:
        set_value(variable, value)


def check_number_of_layers(arguments: Mapping[str, Any], folder) -> None:
    """Raises if a model of `arguments` has layers that the weights in `folder` do not have.

    A model of a thousand layers would be built for nothing.

    Raises:
        ValueError: that names the missing tensors, and as `readers.read_tensors`.
    """
    tensors = read_tensors(folder)
    architecture = architecture_of(read_json(pathlib.Path(folder) / CONFIG_FILE))
    names = names_in(architecture, arguments, tensors)
    blocks = len(arguments["blocks"]) if "blocks" in arguments else arguments["num_layers"]
    expected = blocks // len(names.blocks)
    pattern = re.compile(re.escape(names.layers).replace(r"\{\}", r"\d+"))
    stored = {match[0] for name in tensors if (match := pattern.match(name))}
    # Of a thousand million layers the first that is missing comes soon.
    missing = (names.layers.format(i) for i in range(expected))
    if first := next((prefix for prefix in missing if prefix not in stored), None):
        raise ValueError(
            f"{folder}: {CONFIG_FILE} says {expected} layers, the weights have {len(stored)}. "
            f"In the model, missing in the files: {first}"
        )


def _of_the_model(
    folder: pathlib.Path,
    tensors: Mapping[str, StoredTensor],
    targets: Sequence[Target],
    names: Names,
) -> dict[str, StoredTensor]:
    """Drops what is no part of it: copies of what is shared, as the head may be one, and such."""
    ignored = re.compile(f"{names.ignored}|{BUFFERS}")
    tensors = {name: tensor for name, tensor in tensors.items() if not ignored.fullmatch(name)}
    for copy, original in names.copies.items():
        for name in [name for name in tensors if name.startswith(copy) and copy != original]:
            first = original + name.removeprefix(copy)
            if first in tensors and not same_bits(tensors.pop(name), tensors[first]):
                raise ValueError(f"{folder}: {name} differs from {first}, which the model shares.")
    embedding, has_head = tensors.get(names.embedding), names.head in _names(targets)
    if has_head or names.head not in tensors or embedding is None:
        return tensors
    if not same_bits(tensors.pop(names.head), embedding):
        raise ValueError(
            f"{folder}: {names.head} differs from the embedding, but the model ties the two. Its "
            "configuration should say tie_word_embeddings=False."
        )
    return tensors


def _names(targets: Sequence[Target]) -> set[str]:
    """The tensors that a model is filled from."""
    return {piece.name for target in targets for piece in target.pieces}


def _check_names(folder, tensors: Mapping[str, StoredTensor], targets: Sequence[Target]) -> None:
    expected = _names(targets)
    unused, missing = sorted(set(tensors) - expected), sorted(expected - set(tensors))
    if unused or missing:
        raise ValueError(
            f"The weights in {folder} are not those of the model.\n"
            f"In the files, without a place in the model: {some(unused)}\n"
            f"In the model, missing in the files: {some(missing)}"
        )


def _check_shapes(
    folder, tensors: Mapping[str, StoredTensor], targets: Sequence[Target], names: Names
) -> None:
    problems = []
    for variable, pieces in targets:
        for piece in pieces:
            actual, expected = tensors[piece.name].shape, piece.file_shape(variable.shape)
            rows = names.is_vocabulary(piece.name) and actual[1:] == expected[1:]
            if actual != expected and not (rows and _lacks_padding(actual, expected)):
                problems.append(
                    f"{piece.name}: {actual} in {tensors[piece.name].file.name}, {expected} in "
                    f"the model ({variable.path}){_about_rows(actual, expected) if rows else ''}"
                )
    if problems:
        more = f"\nand {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise ValueError(
            f"Shapes in {folder} differ from the model's.\n"
            + "\n".join(problems[:MOST_SHOWN])
            + more
        )


def _lacks_padding(actual: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return 0 < expected[0] - actual[0] < MOST_PADDING_ROWS


def _about_rows(actual: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if actual[0] < expected[0]:
        return ""
    return (
        f". The file has {actual[0] - expected[0]} rows more, which may be padding: build the "
        f"model with vocabulary_size={actual[0]}"
    )


def _value(tensors: Mapping[str, StoredTensor], target: Target) -> np.ndarray:
    """What fills one variable."""
    variable, pieces = target
    # Memory of its own, which a backend may take over; the file's must not be.
    value = np.zeros(variable.shape, numpy_dtype(variable.dtype))
    for piece in pieces:
        source = piece.of_file(tensors[piece.name].read())
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is refused
            _copy(piece.weight.layout.to_variable(source), piece.of_variable(value))
    return value


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies into the beginning of `target`, stripe by stripe.

    A transposed matrix has the numbers of a row far apart. In stripes, what the processor fetches
    for one row is still at hand for the next.
    """
    target = target[tuple(map(slice, source.shape))]
    for i in range(0, source.shape[-1], STRIPE):
        target[..., i : i + STRIPE] = source[..., i : i + STRIPE]
