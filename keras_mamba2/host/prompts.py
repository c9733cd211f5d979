"""Prompts as rows of token ids, of any lengths."""

from collections.abc import Sequence

import numpy as np

from keras_mamba2.arguments import are_ids
from keras_mamba2.arguments import check_elements
from keras_mamba2.arguments import check_numeric
from keras_mamba2.host.rows import NO_TOKEN

LARGEST_ID = np.iinfo("int32").max


def check_prompts(
    prompts: Sequence[np.ndarray], vocabulary_size: int, waiting: np.ndarray | None = None
) -> None:
    """Raises unless every row has a token and all are in the vocabulary.

    Args:
        prompts: the token ids of each row.
        vocabulary_size: int.
        waiting: `(b)`, the last token of a state that the prompts continue, -1 where it has none.
            `None` without a state.
    """
    if not prompts:
        raise ValueError("There is nothing to generate from: the batch of prompts is empty.")
    if waiting is not None and len(waiting) != len(prompts):
        raise ValueError(
            f"The state has {len(waiting)} rows, but there are {len(prompts)} "
            "prompts. `state.repeat(n)` continues one text several times."
        )
    for i, prompt in enumerate(prompts):
        if not len(prompt) and (waiting is None or waiting[i] == NO_TOKEN):
            raise ValueError(
                f"Prompt {i} has no tokens. A prompt needs at least one: write some text, or "
                "set `add_start_token=True` on the preprocessor."
            )
        if len(prompt) and (prompt.min() < 0 or prompt.max() >= vocabulary_size):
            bad = prompt[(prompt < 0) | (prompt >= vocabulary_size)][0]
            raise ValueError(
                f"Prompt {i} has token id {bad}, outside the model's vocabulary of "
                f"{vocabulary_size}."
            )


def rows_of(token_ids: np.ndarray, padding_mask: np.ndarray) -> list[np.ndarray]:
    """The rows `(b t)` without their padding.

    Raises:
        ValueError: for a mask of another shape, and for ids that are no whole numbers.
    """
    if token_ids.ndim != 2 or token_ids.shape != padding_mask.shape:
        raise ValueError(
            "`token_ids` and `padding_mask` must have one shape, (b t). Received: "
            f"token_ids.shape={token_ids.shape}, padding_mask.shape={padding_mask.shape}"
        )
    check_numeric("`token_ids`", token_ids)
    mask = padding_mask.astype(bool)
    if token_ids.dtype.kind not in "iu":
        is_id = are_ids(token_ids, LARGEST_ID) | ~mask
        check_elements(token_ids, is_id, "`token_ids` must be whole numbers from 0 on.")
        token_ids = np.where(mask, token_ids, 0).astype("int64")
    return [row[real] for row, real in zip(token_ids, mask, strict=True)]


def after_tokens(waiting: np.ndarray, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`prompts`, each after the token that a state has not read yet, if it has one."""
    return [
        prompt if token == NO_TOKEN else np.concatenate([[token], prompt])
        for token, prompt in zip(waiting, prompts, strict=True)
    ]


def seen_ids(rows: Sequence[np.ndarray], vocabulary_size: int) -> np.ndarray:
    """Which ids occur in each row, boolean `(b v)`."""
    seen = np.zeros((len(rows), vocabulary_size), bool)
    if vocabulary_size:
        for row, token_ids in zip(seen, rows, strict=True):
            row[token_ids] = True
    return seen


def padded(rows: Sequence[np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Rows of token ids as a dict of arrays `(b size)`, padded on the right."""
    token_ids = np.zeros((len(rows), size), "int32")
    padding_mask = np.zeros((len(rows), size), bool)
    for i, row in enumerate(rows):
        token_ids[i, : len(row)] = row
        padding_mask[i, : len(row)] = True
    return {"token_ids": token_ids, "padding_mask": padding_mask}
