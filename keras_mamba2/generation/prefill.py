"""Prefill: one block of a prompt, of all rows or of one."""

from keras_mamba2.generation.rows import put
from keras_mamba2.generation.rows import take


def prefill_block(model, state, token_ids, padding_mask):
    """The state after one block."""
    return model.backbone.call_with_state(token_ids, state, padding_mask)[1]


def prefill_row(model, state, row, token_ids):
    """The state after one block `(1 block)` of one row; the others stay as they were."""
    alone = model.backbone.call_with_state(token_ids, take(state, row))[1]
    return put(state, row, alone)
