from collections.abc import Generator
from collections.abc import Iterator
from typing import Any

from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import STRING
from keras_mamba2.host.options import check_session_options
from keras_mamba2.host.text_stream import LastStream
from keras_mamba2.host.text_stream import TextStreams


class Mamba2Session:
    """One text that grows, and the state after it, so that nothing is ever read twice.

    Made by `start` and `resume` of `Mamba2CausalLM` and of `Programs`.

    Args:
        lm: a `Mamba2CausalLM` with a preprocessor, or `Programs` with a tokenizer.
        text: string, all text so far.
        state: the state after it, of one row.

    Example:
    ```python
    session = lm.start("Once upon a time")
    session.generate(" there was", max_new_tokens=50)
    left, right = session.fork(2)
    left.save("story.safetensors")
    session = lm.resume("story.safetensors")
    ```
    """

    def __init__(self, lm, text: str, state: Any):
        self.lm = lm
        self.text = text
        self._state = state
        self._unread = ""  # text that the state has not seen yet
        self._last = LastStream()

    @property
    def state(self) -> Any:
        """The `Mamba2State` after `text`, or that of the programs."""
        if self._unread:
            self._state = self.lm.prefill(self._unread, self._state)
            self._unread = ""
        return self._state

    def generate(self, text: str = "", **kwargs) -> str:
        """Appends `text` and the model's continuation. Returns only the continuation.

        An end token is part of the state, not of the text: the session then goes on after it.

        Args:
            text: string, may be empty.
            **kwargs: of `Mamba2CausalLM.stream`, but for `inputs` and `state`.
        """
        return "".join(self.stream(text, **kwargs))

    def stream(self, text: str = "", **kwargs) -> Iterator[str]:
        """As `generate`, piece by piece. If it is left early, the text ends with the last piece.

        It ends, if it is still open, where the text next grows in another way.
        """
        text = STRING("text", text)
        check_session_options(kwargs)
        self._last.close()
        return self._last.hand_out(self._collect(text, self.lm.stream_on(self, text, **kwargs)))

    def _collect(self, text: str, streams: TextStreams) -> Generator[str]:
        shown, is_over = "", False
        try:
            for [piece] in streams:
                shown += piece
                yield piece
            is_over = True
        finally:
            if is_over or shown:
                self.text += text + shown
                if is_over and not streams.streams[0].stopped:
                    self._state = streams.state
                else:
                    # The loop has gone further than the text: past a stop string, or the last
                    # piece. So the text is read from the former state, but only when the state is
                    # next needed, since an iterator may be closed at any time.
                    self._unread = text + shown

    def append(self, text: str) -> None:
        """Appends `text` without generating any."""
        text = STRING("text", text)
        self._last.close()
        self._state = self.lm.prefill(text, self.state)
        self.text += text

    def fork(self, n: int) -> list["Mamba2Session"]:
        """`n` independent sessions that go on from here. Costs nothing: a state never changes."""
        n = SIZE("n", n)
        return [Mamba2Session(self.lm, self.text, self.state) for _ in range(n)]

    def save(self, file) -> None:
        """Writes text and state to a safetensors file, for `resume`."""
        self.lm.save_state(file, self.state, self.text)

    def __repr__(self) -> str:
        return f"Mamba2Session({len(self.text)} characters, state of {self.state.nbytes} bytes)"
