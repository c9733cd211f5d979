"""Packs documents into rows with little padding, with numbers to tell them apart."""

import bisect
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

import grain
import keras
import numpy as np

from keras_mamba2.tasks.batch_checks import check_texts_alone
from keras_mamba2.tasks.datasets import first_batch

# How many documents of a dataset are packed together: enough to fill rows, few enough that the
# first batch comes soon.
WINDOW = 1024


def pack(
    documents: Sequence[Sequence[int]], sequence_length: int, pad_token_id: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Packs documents into training rows `(b t)`, `t = sequence_length`.

    A document of `n` tokens gives `n - 1` positions, each with the next token as target, so that
    no position is spent on a token after which nothing comes. One with more positions than a row
    is cut into pieces that are documents of their own.

    Returns:
        Tuple `(x, y, sample_weight)`: `x["segment_ids"]` has the documents' numbers, from 1, and
        0 at padding.
    """
    pieces = [
        np.asarray(document[i : i + sequence_length + 1], "int32")
        for document in documents
        for i in range(0, len(document) - 1, sequence_length)
    ]
    rows = best_fit([len(piece) - 1 for piece in pieces], sequence_length)
    shape = (len(rows), sequence_length)
    token_ids, targets = np.full((2, *shape), pad_token_id, "int32")
    segment_ids = np.zeros(shape, "int32")
    for i, row in enumerate(rows):
        start = 0
        for number, piece in enumerate((pieces[j] for j in row), start=1):
            here = slice(start, start + len(piece) - 1)
            token_ids[i, here], targets[i, here] = piece[:-1], piece[1:]
            segment_ids[i, here] = number
            start = here.stop
    real = segment_ids > 0
    x = {"token_ids": token_ids, "padding_mask": real.astype("int32"), "segment_ids": segment_ids}
    return x, targets, real


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The documents of each row: longest first, each in the row where it leaves the least free."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # sorted pairs of (positions left, row)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(free, (lengths[i], 0))
        left, row = free.pop(place) if place < len(free) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return sorted(sorted(row) for row in rows)  # in the order of the documents


def packed_dataset(dataset, preprocessor: Callable):
    """Batches of texts as batches of packed rows, as many rows each as there were texts.

    Args:
        dataset: a `tf.data.Dataset`, `grain.MapDataset` or `grain.IterDataset` of batches of
            strings, or of tuples of one.
        preprocessor: maps a batch of strings to packed rows.

    Returns:
        The same kind of dataset. If its elements are preprocessed rows already, `dataset`.
    """
    texts = _texts(first_batch(dataset))
    if isinstance(texts, Mapping):
        return dataset
    if hasattr(dataset, "element_spec"):
        windows = dataset.map(lambda *element: element[0]).unbatch().batch(WINDOW)
        return windows.map(preprocessor).unbatch().batch(len(texts))
    if isinstance(dataset, grain.MapDataset):
        dataset = dataset.to_iter_dataset()
    rebatch = grain.experimental.RebatchIterDataset
    windows = rebatch(dataset.map(lambda element: np.array(_texts(element), object)), WINDOW)
    return rebatch(windows.map(lambda texts: preprocessor(texts.tolist())), len(texts))


def _texts(element):
    element = element if isinstance(element, tuple) else (element,)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(element)
    if not isinstance(x, Mapping):
        check_texts_alone(y, sample_weight)
    return x
