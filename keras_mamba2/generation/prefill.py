"""Prefill: one block of a prompt, of all rows or of one, and how long blocks are."""

from keras_mamba2.generation.rows import put
from keras_mamba2.generation.rows import take
from keras_mamba2.host.blocks import BLOCK_SIZES
from keras_mamba2.ops.platform import on_gpu

# A GPU takes longer blocks at the same speed, and starts fewer kernels: on an H100 8,192 tokens of
# 130M in bfloat16 take 47 ms in blocks of 512, 36 ms in blocks of 2,048 and in one of 8,192.
LONG_BLOCK_ON_GPU = 2048
MOST_TOKENS_A_BLOCK = 2**14  # of all rows together: memory grows with them


def default_block_sizes(batch_size: int) -> tuple[int, ...]:
    """The lengths of blocks that are fast on the platform, in falling order."""
    if on_gpu() and batch_size * LONG_BLOCK_ON_GPU <= MOST_TOKENS_A_BLOCK:
        return (LONG_BLOCK_ON_GPU, *BLOCK_SIZES)
    return BLOCK_SIZES


def prefill_block(model, state, token_ids, padding_mask):
    """The state after one block."""
    return model.backbone.call_with_state(token_ids, state, padding_mask)[1]


def prefill_row(model, state, row, token_ids):
    """The state after one block `(1 block)` of one row; the others stay as they were."""
    alone = model.backbone.call_with_state(token_ids, take(state, row))[1]
    return put(state, row, alone)
