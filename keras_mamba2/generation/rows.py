"""Rows of a running loop, put in and taken out on the device."""

from keras import ops
from keras import tree


def put(rows, index, row):
    """`rows` with `row`, a batch of one, at `index`: both pytrees with batch-first leaves."""

    def put_leaf(leaf, new):
        return ops.slice_update(leaf, (index, *[0] * (len(leaf.shape) - 1)), new)

    return tree.map_structure(put_leaf, rows, row)


def take(rows, index):
    """The row at `index` as a batch of one."""
    return select(rows, index[None])


def select(rows, indices):
    """The rows at `indices` `(n)`, in this order."""
    return tree.map_structure(lambda leaf: ops.take(leaf, indices, axis=0), rows)
