"""Prefill: prompts of any lengths through a few compiled programs, block after block."""

from collections.abc import Iterator

import numpy as np

from keras_mamba2.generation.rows import put
from keras_mamba2.generation.rows import take

# A prompt is cut into blocks of these lengths, each one compiled program, so that the number of
# programs does not depend on the prompts. The last block is padded by less than half.
BLOCK_SIZES = (512, 64, 8)


def block_sizes(length: int) -> list[int]:
    """The blocks that a prompt of `length` tokens is cut into."""
    blocks: list[int] = []
    for size, smaller in zip(BLOCK_SIZES, (*BLOCK_SIZES[1:], 0), strict=True):
        while length > 0 and (length > size // 2 or smaller == 0):
            blocks.append(size)
            length -= size
    return blocks


def blocks(prompts: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields `(token_ids, padding_mask)` `(b block)` over prompts of any lengths, in order."""
    lengths = np.array([len(prompt) for prompt in prompts])
    start = 0
    for size in block_sizes(int(lengths.max())):
        token_ids = np.zeros((len(prompts), size), "int32")
        for row, prompt in zip(token_ids, prompts, strict=True):
            piece = prompt[start : start + size]
            row[: len(piece)] = piece
        yield token_ids, np.arange(start, start + size) < lengths[:, None]
        start += size


def blocks_alone(lengths: list[int]) -> list[int]:
    """How many of the longest blocks each row runs alone, before all rows run together.

    In a batch every row costs as much as the longest one. So the blocks that most of the rows
    have are run together, and the other blocks row by row.
    """
    whole = [length // BLOCK_SIZES[0] for length in lengths]
    shared = sorted(whole, reverse=True)[len(whole) // 2]
    return [max(count - shared, 0) for count in whole]


def prefill_block(model, state, token_ids, padding_mask):
    """The state after one block."""
    return model.backbone.call_with_state(token_ids, state, padding_mask)[1]


def prefill_row(model, state, row, token_ids):
    """The state after one block `(1 block)` of one row; the others stay as they were."""
    alone = model.backbone.call_with_state(token_ids, take(state, row))[1]
    return put(state, row, alone)
