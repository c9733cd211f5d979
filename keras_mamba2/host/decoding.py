"""The host's side of a decode loop that runs on the device, a few tokens at a time."""

from collections.abc import Iterable

import numpy as np

from keras_mamba2.host.rows import NO_TOKEN
from keras_mamba2.host.rows import NOT_FINITE
from keras_mamba2.host.rows import Rows

NOT_FINITE_REASON = (
    "The weights or the state hold NaN or infinity, or numbers that are too large for the dtype."
)


class Decoding:
    """A decode loop in progress. Each iteration runs it, and gives the new tokens of each row.

    It ends when all rows have stopped. Between runs `rows` holds their progress.

    Args:
        generator: what runs it, a `Generator` or an `Engine`.
        rows: `Rows`, the progress of each row.
        run_lengths: ints, the number of tokens of each run; as many as it can after the last.
        with_logprobs: bool, whether to keep log probabilities for `likely_tokens`.

    Raises:
        ValueError: when the logits of a row are not finite.
    """

    def __init__(
        self,
        generator,
        rows: Rows,
        run_lengths: Iterable[int] = (),
        with_logprobs: bool = False,
    ):
        self.generator = generator
        self.rows = rows
        self._tokens: list[list[np.ndarray]] = [[np.zeros(0, "int32")] for _ in rows.remaining]
        self._logprobs: list[list[np.ndarray]] = [[np.zeros(0, "float32")] for _ in rows.remaining]
        self._with_logprobs = with_logprobs
        self._run_lengths = iter(run_lengths)

    def __iter__(self) -> "Decoding":
        return self

    def __next__(self) -> list[np.ndarray]:
        missing = int(self.generator.to_numpy(self.rows.remaining).max())
        if missing <= 0:
            raise StopIteration
        capacity = self.generator.decode_capacity
        num_steps = min(next(self._run_lengths, capacity), missing, capacity)
        rows, *found = self.advance(num_steps)
        tokens, logprobs = map(self.generator.to_numpy, found)
        self.rows = Rows(*rows)
        self._check_finite(tokens)
        is_token = tokens != NO_TOKEN
        new = [row[mask] for row, mask in zip(tokens, is_token, strict=True)]
        for i, row in enumerate(new):
            self._tokens[i].append(row)
            if self._with_logprobs:
                self._logprobs[i].append(logprobs[i][is_token[i]])
        return new

    @property
    def state(self):
        """The state after all tokens so far. It stays as it is when the loop goes on."""
        is_over = self.generator.to_numpy(self.rows.remaining).max() <= 0
        # The next run reuses the memory of the loop's own.
        return self.rows.state if is_over else self.generator.copied(self.rows.state)

    def advance(self, num_steps: int):
        return self.generator.advance(self.rows, num_steps, self._with_logprobs)

    def all_tokens(self) -> list[np.ndarray]:
        """Runs to the end. Returns the tokens of each row."""
        for _ in self:
            pass
        return self.tokens()

    def tokens(self) -> list[np.ndarray]:
        """The tokens of each row so far."""
        return [np.concatenate(row) for row in self._tokens]

    def likely_tokens(self) -> list[dict[str, np.ndarray]]:
        """The tokens of each row and their log probabilities; `[]` without `with_logprobs`."""
        if not self._with_logprobs:
            return []
        return [
            {"token_ids": np.concatenate(tokens), "logprobs": np.concatenate(logprobs)}
            for tokens, logprobs in zip(self._tokens, self._logprobs, strict=True)
        ]

    def stop(self, row: int) -> None:
        """Ends `row`: it gets no more tokens."""
        remaining = np.array(self.generator.to_numpy(self.rows.remaining))
        remaining[row] = 0
        self.rows = self.rows._replace(remaining=remaining)

    def _check_finite(self, tokens: np.ndarray) -> None:
        rows = np.flatnonzero((tokens == NOT_FINITE).any(axis=1))
        if len(rows):
            length = self.generator.to_numpy(self.rows.state.length)[rows[0]]
            raise ValueError(
                f"The logits of row {rows[0]} after {length} tokens are not finite. "
                + NOT_FINITE_REASON
            )
