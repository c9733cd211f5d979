"""Several sequences in one row: where each begins. Notation: `ops/ssd.py`."""

from keras import ops


def runs(segment_ids):
    """Numbers the runs of equal ids in `(b t)` from 0, so that an id which comes back is new."""
    changed = ops.cast(segment_ids[:, 1:] != segment_ids[:, :-1], "int32")
    return ops.pad(ops.cumsum(changed, axis=1), [(0, 0), (1, 0)])


def document_segments(segment_ids, mask=None):
    """Numbers the documents of packed rows `(b t)` from 0, so that padding begins none.

    What is before a row's first token, or before its padding on the left, belongs to its first
    document. A document goes on as long as its number does, without padding in between.

    Args:
        segment_ids: int tensor `(b t)`, whose values at padding do not matter.
        mask: optional boolean tensor `(b t)`, true at real tokens.
    """
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    if mask is None:
        return ops.pad(ops.cumsum(ops.cast(changed, "int32"), axis=1), [(0, 0), (1, 0)])
    changed = ops.pad(ops.logical_or(changed, ops.logical_not(mask[:, :-1])), [(0, 0), (1, 0)])
    seen = ops.cumsum(ops.cast(mask, "int32"), axis=1)
    begins = ops.logical_and(ops.logical_and(changed, mask), seen > 1)
    return ops.cumsum(ops.cast(begins, "int32"), axis=1)
