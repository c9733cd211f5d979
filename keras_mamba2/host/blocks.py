"""Prompts of any lengths as blocks of a few lengths, each of which is one compiled program."""

import functools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm.auto

# A longer prompt has a progress bar.
LONG_PROMPT = 100_000
# A prompt is cut into blocks of these lengths, each one compiled program, so that the number of
# programs does not depend on the prompts.
BLOCK_SIZES = (512, 128, 64, 32, 16)
# To read the weights takes as long as to compute with so many tokens: on a CPU a block of n tokens
# takes 32 + n parts of time. Platforms that compute faster beside their memory prefer fewer blocks
# still, but lose little.
WEIGHTS_AS_TOKENS = 32


def block_sizes(length: int, sizes: Sequence[int] = BLOCK_SIZES) -> list[int]:
    """The blocks that a prompt of `length` tokens is cut into, in falling order.

    The last may be longer than what is left: padding can cost less than one more block.
    """
    count, rest = divmod(length, sizes[0])
    return [sizes[0]] * count + list(_cheapest(rest, tuple(sizes)))


@functools.cache
def _cheapest(length: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    if length <= 0:
        return ()
    ways = [(size, *_cheapest(length - size, sizes)) for size in sizes]
    return min(ways, key=lambda way: sum(way) + WEIGHTS_AS_TOKENS * len(way))


def blocks(
    prompts: list[np.ndarray], sizes: Sequence[int] = BLOCK_SIZES
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields `(token_ids, padding_mask)` `(b block)` over prompts of any lengths, in order."""
    lengths = np.array([len(prompt) for prompt in prompts])
    start = 0
    for size in block_sizes(int(lengths.max()), sizes):
        token_ids = np.zeros((len(prompts), size), "int32")
        for row, prompt in zip(token_ids, prompts, strict=True):
            piece = prompt[start : start + size]
            row[: len(piece)] = piece
        yield token_ids, np.arange(start, start + size) < lengths[:, None]
        start += size


def blocks_alone(lengths: list[int], sizes: Sequence[int] = BLOCK_SIZES) -> list[int]:
    """How many of the longest blocks each row runs alone, before all rows run together.

    In a batch every row costs as much as the longest one. So the blocks that most of the rows
    have are run together, and the other blocks row by row.
    """
    whole = [length // sizes[0] for length in lengths]
    shared = sorted(whole, reverse=True)[len(whole) // 2]
    return [max(count - shared, 0) for count in whole]


def feed(
    state,
    prompts: list[np.ndarray],
    prefill_block: Callable,
    prefill_row: Callable,
    sizes: Sequence[int] = BLOCK_SIZES,
) -> Any:
    """The state after all tokens of `prompts`, one a row. `state` cannot be used any more.

    Args:
        state: what the prompts continue.
        prompts: rows of token ids, of any lengths.
        prefill_block: function `(state, token_ids, padding_mask)`, for all rows.
        prefill_row: function `(state, row, token_ids)`, for one row.
        sizes: ints, the lengths of blocks, in falling order.
    """
    prompts = list(prompts)
    longest = max(len(prompt) for prompt in prompts)
    bar = tqdm.auto.tqdm(total=longest, unit=" tokens", disable=longest <= LONG_PROMPT)
    counts = blocks_alone([len(prompt) for prompt in prompts], sizes)
    for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        cuts = np.arange(1, count + 1) * sizes[0]
        *alone, prompts[i] = np.split(prompt, cuts)
        for piece in alone:
            state = prefill_row(state, np.array(i, "int32"), piece[None])
    for token_ids, padding_mask in blocks(prompts, sizes):
        state = prefill_block(state, token_ids, padding_mask)
        if not bar.disable:
            int(state.length[0])  # waits for the device, so that the bar is right
            bar.update(token_ids.shape[1])
    bar.close()
    return state
