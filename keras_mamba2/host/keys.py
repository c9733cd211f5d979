"""Random numbers belong to a row: its key, from the seed of a run and from what the row says."""

import hashlib
from collections import Counter
from collections.abc import Hashable
from collections.abc import Sequence

import numpy as np


def row_keys(
    seed: int | str, texts: Sequence[Hashable], num_generators: int, dtype: str
) -> np.ndarray:
    """The seed of each row's random generators, `(b r)`.

    It depends on the seed of the run, and on how many rows above it have the same text. So a row
    draws the same numbers as alone, and rows with the same text draw different ones.
    """
    keys = np.zeros((len(texts), num_generators), dtype)
    above: Counter[Hashable] = Counter()
    for row, text in zip(keys, texts, strict=True):
        for i in range(num_generators):
            hashed = hashlib.sha256(f"{seed} {above[text]} {i}".encode()).digest()
            row[i] = int.from_bytes(hashed[:4]) >> 1  # 31 bits: positive in every dtype
        above[text] += 1
    return keys


def row_texts(
    prompts: Sequence[np.ndarray],
    digests: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
) -> list[Hashable]:
    """What tells the text of each row from others: its tokens, and the text that they continue.

    Args:
        prompts: the token ids of each row.
        digests: `(b)`, of the texts before, if there are such.
        tokens: `(b)`, the last token of each, which the digest does not count.
    """
    rows = [np.asarray(prompt, "int32").tobytes() for prompt in prompts]
    if digests is None or tokens is None:
        return [(row,) for row in rows]
    return [(int(d), int(t), row) for d, t, row in zip(digests, tokens, rows, strict=True)]
