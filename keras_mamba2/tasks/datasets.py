"""Data for `fit`, `evaluate` and `predict` as they come: arrays, lists, and datasets of batches."""

from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import grain
import keras
import numpy as np
from keras import tree

from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import optional
from keras_mamba2.devices import check_batches
from keras_mamba2.tasks.batch_checks import parts_of


def is_dataset(x) -> bool:
    """Whether `x` is a `tf.data.Dataset` or a `grain` dataset."""
    return hasattr(x, "element_spec") or isinstance(x, (grain.MapDataset, grain.IterDataset))


def batches(inputs: Any) -> Iterator[Any]:
    """The elements of a dataset; anything else is one batch."""
    if not is_dataset(inputs):
        yield inputs
    elif hasattr(inputs, "as_numpy_iterator"):
        yield from inputs.as_numpy_iterator()
    else:
        yield from inputs


def check_batches_of(x, batch_size: int | None, steps: int | None = None) -> None:
    """Refuses rows that the devices of a distribution cannot share, where their number is known.

    With `steps` no more batches are read.
    """
    parts = parts_of(x)
    if not is_dataset(x) and parts and hasattr(parts[0], "__len__"):
        most = len(parts[0]) if steps is None else steps * (batch_size or 32)
        check_batches(min(len(parts[0]), most), batch_size)


def first_batch(dataset):
    """The first element of a dataset, which must have one."""
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("The dataset is empty.")
    return first


class _Rows:
    """Arrays of equal length, in any structure, as a source of `grain`."""

    def __init__(self, rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(tree.flatten(self._rows)[0])

    def __getitem__(self, index: int):
        return tree.map_structure(lambda part: part[index], self._rows)


def batched_dataset(
    x, y, sample_weight, batch_size: int | None, shuffle: bool = False
) -> grain.MapDataset:
    """Batches of texts or preprocessed rows; shuffled in another order each time it is repeated."""
    if isinstance(x, Mapping):
        x = {name: np.asarray(part) for name, part in x.items()}
    else:
        texts = [np.array(list(part), object) for part in parts_of(x)]
        x = tuple(texts) if isinstance(x, tuple) else texts[0]
    y, sample_weight = (None if a is None else np.asarray(a) for a in (y, sample_weight))
    rows = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
    dataset = grain.MapDataset.source(_Rows(rows))
    if shuffle:
        seed = int(np.random.randint(2**31))  # noqa: NPY002, what `set_random_seed` sets
        dataset = dataset.seed(seed).shuffle()
    return dataset.batch(batch_size or 32)


def arguments_of_fit(
    rows: tuple[Any, Any, Any],
    validation_data,
    batch_size: int | None,
    validation_split: float | None,
    shuffle: bool,
    validation_batch_size: int | None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Arguments for KerasHub's `fit`, which neither shuffles nor has another size for validation.

    Args:
        rows: `(x, y, sample_weight)`.
        validation_data: the same for validation, or what KerasHub takes.
        batch_size: int, as in `keras.Model.fit`, like the following.
        validation_split: float, as there.
        shuffle: bool, whether `x` is read in another order in every epoch, if it is no dataset.
        validation_batch_size: int, as there.
        **kwargs: all others.
    """
    size = optional(SIZE)("validation_batch_size", validation_batch_size) or batch_size
    if validation_split and (shuffle or validation_batch_size):
        raise ValueError(
            "`shuffle` and `validation_batch_size` do not go with `validation_split`. Pass "
            "`validation_data`."
        )
    if isinstance(validation_data, tuple):
        x, y, sample_weight = validation_data
        check_batches_of(x, size, kwargs.get("validation_steps"))
        # KerasHub batches it as `x`, and a dataset has no size of batches to tell.
        if (shuffle or validation_batch_size) and not is_dataset(x):
            validation_data = batched_dataset(x, y, sample_weight, size)
        else:
            validation_data = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
    x, y, sample_weight = rows
    if not validation_split:
        check_batches_of(x, batch_size, kwargs.get("steps_per_epoch"))
    if shuffle and not is_dataset(x):
        x = batched_dataset(x, y, sample_weight, batch_size, shuffle=True)
        y = sample_weight = batch_size = None
    return {
        "x": x,
        "y": y,
        "batch_size": batch_size,
        "sample_weight": sample_weight,
        "validation_data": validation_data,
        "validation_split": validation_split,
        **kwargs,
    }
