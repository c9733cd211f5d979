"""A conversation in a terminal."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from keras_mamba2.untrusted import shown

HELP = """\
/save FILE   writes the conversation, with the state after it
/load FILE   goes on with one that was written
/fork        goes on with a copy; /fork 1 goes back to the first
/undo        takes the last turn back
/quit        ends, as Ctrl-D does; Ctrl-C ends a reply
//...        says something that begins with a slash"""


class Terminal:
    """Says what is typed, and shows the replies as they come. A line with a slash is a command.

    Replies go to stdout, all else to stderr, so that piped lines give the replies alone.

    Args:
        chat: a `keras_mamba2.Mamba2Chat`.
        load: function from the path of a file to such a conversation.
    """

    def __init__(self, chat, load: Callable[[str], Any]):
        import rich.console

        self.chats = [chat]
        self.current = 0
        self.failed = False
        self._load = load
        self._notes = rich.console.Console(
            stderr=True, highlight=False, soft_wrap=True, emoji=False
        )
        self._commands = {
            "/save": self._save,
            "/load": self._resume,
            "/fork": self._fork,
            "/undo": self._undo,
            "/help": lambda argument: self._note(HELP),
        }

    @property
    def chat(self):
        return self.chats[self.current]

    def run(self) -> None:
        """Until there are no more lines, or `/quit`; of a pipe also until Ctrl-C."""
        for line in self._lines():
            if line.partition(" ")[0] in ("/quit", "/exit"):
                return
            try:
                self._do(line)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                self._note("\nstopped")
            except BrokenPipeError:  # nobody reads the replies any more
                raise
            except (ValueError, OSError) as error:
                self.failed = True
                self._note(f"error: {error}", style="red")

    def _do(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if not line.startswith("/") or line.startswith("//"):
            self._say(line.removeprefix("/") if line.startswith("//") else line)
        elif command in self._commands:
            self._commands[command](argument.strip())
        else:
            raise ValueError(f"There is no command {command}. /help lists them.")

    def _lines(self) -> Iterator[str]:
        if not sys.stdin.isatty():
            yield from filter(None, map(str.strip, sys.stdin))
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  `input` edits and remembers lines with it
        self._note("/help lists the commands.")
        while True:
            try:
                if not sys.stdout.isatty():  # where `input` would write it
                    print("> ", end="", file=sys.stderr, flush=True)
                if line := input("> " if sys.stdout.isatty() else "").strip():
                    yield line
            except KeyboardInterrupt:
                self._note("\n/quit or Ctrl-D to end")
            except EOFError:
                return

    def _say(self, text: str) -> None:
        first = None
        try:
            with contextlib.closing(self.chat.stream(text)) as pieces:
                for piece in pieces:
                    first = first or time.perf_counter()
                    print(shown(piece), end="", flush=True)
        except KeyboardInterrupt:
            # Where nothing was shown, nothing was said. Lines of a pipe do not go on after half
            # of a reply.
            if first is None or not sys.stdin.isatty():
                raise
        print(flush=True)
        self._note(self._speed(first))

    def _speed(self, first: float | None) -> str:
        """What the last turn took; `first` is when its reply began to be shown."""
        usage = self.chat.usage
        read = usage.prompt_tokens - usage.cached_tokens
        text = f"{usage.new_tokens} tokens"
        if first is not None and usage.new_tokens > 1:
            # From the first on: before it, programs are compiled and the turn is read.
            seconds = time.perf_counter() - first
            text += f", {(usage.new_tokens - 1) / max(seconds, 1e-6):.0f} tokens/s"
        return f"{text}; {read} read, {usage.cached_tokens} remembered"

    def _save(self, file: str) -> None:
        file = _path(file, "/save")
        self.chat.save(file)
        self._note(f"saved: {file}")

    def _resume(self, file: str) -> None:
        self.chats[self.current] = self._load(_path(file, "/load"))
        for message in self.chat.messages:
            self._note(f"{message['role']}: {message.get('content', '')}")

    def _fork(self, number: str) -> None:
        if not number:
            self.chats.append(self.chat.fork())
            number = str(len(self.chats))
        if not number.isdecimal() or not 1 <= int(number) <= len(self.chats):
            raise ValueError(
                f"There are the conversations 1 to {len(self.chats)}. Received: /fork {number}"
            )
        self.current = int(number) - 1
        self._note(f"conversation {number} of {len(self.chats)}")

    def _undo(self, argument: str) -> None:
        said = self.chat.undo()[0].get("content", "")
        self._note(f"taken back: {said}")

    def _note(self, text: str, style: str = "dim") -> None:
        self._notes.print(shown(text), style=style, markup=False)


def _path(file: str, command: str) -> str:
    """A path as it is typed, where no shell has read it."""
    if not file:
        raise ValueError(f"{command} needs the name of a file, such as {command} chat.safetensors")
    return os.path.expanduser(file)
