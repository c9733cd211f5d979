"""From tokens to text, as soon as the text is certain."""

import itertools
import weakref
from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_mamba2.host.decoding import Decoding

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for half a character
NUM_BEFORE = 16  # so many tokens are enough to know that a text has begun
# Of tokens that are open, among which a character is then cut. Pieces of random bytes end in half a
# character three times in four, but not that often in a row.
MOST_OPEN = 1024


# Not `tokenizers.decoders.DecodeStream`: it never returns an unfinished end of a text, and raises
# where bytes that are no character follow others. `tests/tasks/test_text_stream.py` shows both.
class TextStream:
    """The text of one row, whose tokens come a few at a time.

    Text is held back while it ends in half a character, and while it may be the beginning of a
    stop string. Text that was returned is final. All of it together is the decoded text, up to the
    first stop string.

    Args:
        decode: function from a list of token ids to a string.
        skip: token ids that are no text, such as the end token.
        stop_strings: strings that end the text; the one that is complete first is left out.
        before: token ids of a text that this one continues.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        skip: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        before: Sequence[int] | np.ndarray = (),
    ):
        self.stopped = False
        self._decode = decode
        self._skip = frozenset(skip)
        self._stop_strings = tuple(stop_strings)
        # Tokens from the last place where a character ended, with one window of context before,
        # since some tokenizers write a token differently at the start of a text.
        self._context = whole_end(self._text_ids(before[-NUM_BEFORE:]), decode)
        self._open: list[int] = []
        self._held = ""  # decoded, but it may begin a stop string

    @property
    def has_stop_strings(self) -> bool:
        return bool(self._stop_strings)

    @property
    def num_held(self) -> int:
        """How many characters are decoded, and not given yet: a stop string may begin there."""
        return len(self._held)

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes new tokens, and returns the text that has become certain."""
        if self.stopped:
            return ""
        self._open += self._text_ids(token_ids)
        text = self._new_text()
        # All that is open is decoded again with each token.
        if text.endswith(UNFINISHED) and len(self._open) < MOST_OPEN:
            return ""
        self._context, self._open = self._open or self._context, []
        return self._give(text)

    def finish(self) -> str:
        """Returns the rest of the text, when no more tokens come."""
        if self.stopped:
            return ""
        text, self._open = self._new_text(), []
        certain = self._give(text)
        rest, self._held = self._held, ""
        return certain + rest

    def _text_ids(self, token_ids: Iterable[int]) -> list[int]:
        return [int(id) for id in token_ids if int(id) not in self._skip]

    def _new_text(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode([*self._context, *self._open])[len(before) :]

    def _give(self, text: str) -> str:
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stop_strings if stop in text]
        if found:
            self.stopped, self._held = True, ""
            # The one that was complete first, however many tokens came at once.
            return text[: min((start + len(stop), start) for start, stop in found)[1]]
        held = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def text_after(
    before: Sequence[int] | np.ndarray,
    token_ids: Iterable[int],
    decode: Callable[[Sequence[int]], str],
    skip: Sequence[int] = (),
) -> str:
    """The text of tokens that continue others, as a `TextStream` gives it."""
    parts = before[-NUM_BEFORE:], token_ids
    last, new = ([int(id) for id in part if id not in skip] for part in parts)
    context = whole_end(last, decode)
    return decode([*context, *new])[len(decode(context)) if context else 0 :]


def whole_end(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """The end of `token_ids` from where on none is part of a character that is not all there."""
    ends = (list(token_ids[i:]) for i in range(len(token_ids)))
    return next((end for end in ends if UNFINISHED not in decode(end)), [])


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


class LastStream:
    """The last iterator that was handed out. It ends with its last reference, or where it must."""

    def __init__(self) -> None:
        self._pieces: Callable[[], Generator[str] | None] = lambda: None

    def hand_out(self, pieces: Generator[str]) -> Iterator[str]:
        self._pieces = weakref.ref(pieces)
        return pieces

    def close(self) -> None:
        """Ends it, if somebody has it still."""
        pieces = self._pieces()
        if pieces is not None:
            pieces.close()


# The first piece comes after one token. Later runs are longer, which costs less.
FIRST_RUNS = (1, 2, 4, 8)
LATER_RUNS = 16


class TextStreams(Iterator[list[str]]):
    """Yields what is new in the text of each row of a loop, run after run.

    Args:
        decoding: the loop. Of programs for a fixed batch size it may have more rows at the end,
            of which nothing is asked.
        streams: a stream for each text.
    """

    def __init__(self, decoding: Decoding, streams: Sequence[TextStream]):
        self.decoding = decoding
        self.streams = streams
        self._pieces = self._run()

    def __next__(self) -> list[str]:
        return next(self._pieces)

    @property
    def state(self) -> Any:
        """The state after all tokens so far, a row for each text. It stays as it is."""
        state = self.decoding.state
        return state if state.batch_size == len(self.streams) else state[: len(self.streams)]

    def all_texts(self) -> list[str]:
        """Runs to the end. Returns the text of each row."""
        texts = [""] * len(self.streams)
        for pieces in self:
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def _run(self) -> Iterator[list[str]]:
        for tokens in self.decoding:
            pieces = []
            for i, (stream, new) in enumerate(zip(self.streams, tokens, strict=False)):
                pieces.append(stream.push(new))
                if stream.stopped and len(new):
                    self.decoding.stop(i)
            if any(pieces):
                yield pieces
        pieces = [stream.finish() for stream in self.streams]
        if any(pieces):
            yield pieces


def run_lengths() -> Iterator[int]:
    return itertools.chain(FIRST_RUNS, itertools.repeat(LATER_RUNS))
