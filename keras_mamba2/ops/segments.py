"""Several sequences in one row: where each begins. Notation: `ops/ssd.py`."""

from keras import ops


def runs(segment_ids):
    """Numbers the runs of equal ids in `(b t)` from 0, so that an id which comes back is new."""
    changed = ops.cast(segment_ids[:, 1:] != segment_ids[:, :-1], "int32")
    return ops.pad(ops.cumsum(changed, axis=1), [(0, 0), (1, 0)])


def segment_ids_of(padding_mask):
    """The `segment_ids` of a packed row's mask `(b t)`: 0 is padding, other numbers documents.

    Padding begins no segment, so that what is before a row's first token, or before its padding
    on the left, belongs to its first document.
    """
    is_real = padding_mask != 0
    seen = ops.cumsum(ops.cast(is_real, "int32"), axis=1)
    changed = ops.pad(padding_mask[:, 1:] != padding_mask[:, :-1], [(0, 0), (1, 0)])
    begins = ops.logical_and(ops.logical_and(changed, is_real), seen > 1)
    return ops.cumsum(ops.cast(begins, "int32"), axis=1)
