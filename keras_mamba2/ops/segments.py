"""Several sequences in one row: where each begins. Notation: `ops/ssd.py`."""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops


def runs(segment_ids):
    """Numbers the runs of equal ids in `(b t)` from 0: an id that comes back gets a new number."""
    changed = ops.cast(segment_ids[:, 1:] != segment_ids[:, :-1], "int32")
    return ops.pad(ops.cumsum(changed, axis=1), [(0, 0), (1, 0)])


def document_segments(segment_ids, mask=None):
    """Numbers the documents of packed rows `(b t)` from 0; padding starts no document.

    Positions before a row's first real token belong to its first document. A document ends where
    its number changes, and at padding.

    Args:
        segment_ids: int tensor `(b t)`, whose values at padding do not matter.
        mask: optional boolean tensor `(b t)`, true at real tokens.
    """
    if mask is None:
        return runs(segment_ids)
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    changed = ops.pad(ops.logical_or(changed, ops.logical_not(mask[:, :-1])), [(0, 0), (1, 0)])
    seen = ops.cumsum(ops.cast(mask, "int32"), axis=1)
    begins = ops.logical_and(ops.logical_and(changed, mask), seen > 1)
    return ops.cumsum(ops.cast(begins, "int32"), axis=1)


class Documents(NamedTuple):
    """The place of each token of rows `(b t)` in its document; the first may continue a state."""

    positions: Any  # (b t) int32, how many tokens of its document are before each
    continues: Any  # (b t) bool, whether its document is the state's
    after: Any  # (b) int32, how many of the state's tokens belong to the last document
    first: Any  # (b) int32, where the last document begins in the row
    new: Any  # (b) int32, how many tokens of the row belong to it


def documents_of(x, mask=None, segment_ids=None, length=None) -> Documents:
    """The documents of `x` `(b t d)`, after `length` `(b)` tokens of the first one.

    Args:
        x: tensor `(b t d)`.
        mask: optional boolean tensor `(b t)`, true at real tokens.
        segment_ids: optional int tensor `(b t)`, from `document_segments`.
        length: optional int32 tensor `(b)`. `None` for 0.
    """
    b, t = ops.shape(x)[:2]
    length = ops.zeros((b,), "int32") if length is None else length
    real = ops.ones((b, t), "int32") if mask is None else ops.cast(mask, "int32")
    segments = ops.zeros((b, t), "int32") if segment_ids is None else segment_ids
    before = ops.cumsum(real, axis=1) - real
    continues = segments == segments[:, :1]
    last = ops.cast(segments == segments[:, -1:], "int32") * real
    start = 0 if segment_ids is None else _starts(segments, before)
    return Documents(
        positions=before - start + ops.where(continues, length[:, None], 0),
        continues=continues,
        after=ops.where(continues[:, -1], length, 0),
        first=ops.cast(ops.argmax(last, axis=1), "int32"),
        new=ops.sum(last, axis=1),
    )


def _starts(segments, before):
    """How many tokens of the row are before each position's document, `(b t)`."""
    if keras.config.backend() == "jax":
        begins = ops.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)])
        return ops.associative_scan(ops.maximum, ops.where(begins, before, 0), axis=1)
    # Keras' scan has no static rank in a graph of TensorFlow, and leaves the GPU of torch.
    same = segments[:, :, None] == segments[:, None, :]
    return ops.min(ops.where(same, before[:, None], ops.max(before)), axis=2)
