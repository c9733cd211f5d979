"""The terminal around a conversation: commands, Ctrl-C, and what goes where."""

import builtins
import io
import os
import sys

import pytest

from keras_mamba2.chat.terminal import Terminal
from keras_mamba2.untrusted import shown


class Usage:
    prompt_tokens, cached_tokens, new_tokens = 30, 20, 5


class Echo:
    """A conversation that says again what was said, in pieces; and may be interrupted in it."""

    usage = Usage()

    def __init__(self, said=()):
        self.said = list(said)

    @property
    def messages(self):
        return [{"role": "user", "content": text} for text in self.said]

    def stream(self, text):
        if text == "long":
            raise ValueError("too long")
        return self._pieces(text)

    def _pieces(self, text):
        for word in text.split():
            if word == "interrupted":
                raise KeyboardInterrupt
            yield f"{word} "
        self.said.append(text)

    def undo(self):
        return [{"role": "user", "content": self.said.pop()}]

    def fork(self):
        return Echo(self.said)

    def save(self, file):
        if not self.said:
            raise ValueError("nothing to save")


def run(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    terminal = Terminal(Echo(), lambda file: Echo([f"from {file}"]))
    terminal.run()
    return terminal


def test_replies_go_to_stdout_and_the_rest_to_stderr(monkeypatch, capsys):
    terminal = run(monkeypatch, "one two", "", "  three ", "//four", "/quit", "five")
    out, err = capsys.readouterr()
    assert out == "one two \nthree \n/four \n"
    assert "5 tokens, " in err
    assert "tokens/s; 10 read, 20 remembered" in err
    assert terminal.chat.said == ["one two", "three", "/four"]
    assert not terminal.failed


def test_commands(monkeypatch, capsys):
    terminal = run(
        monkeypatch,
        *("one", "/save a.safetensors", "/fork", "two", "/undo", "three", "/fork 1", "/help"),
    )
    err = capsys.readouterr().err
    assert [chat.said for chat in terminal.chats] == [["one"], ["one", "three"]]
    assert terminal.current == 0
    for note in ("saved: a.safetensors", "taken back: two", "conversation 1 of 2", "/load FILE"):
        assert note in err
    terminal = run(monkeypatch, "/load b.safetensors")
    assert "user: from b.safetensors" in capsys.readouterr().err
    assert terminal.chat.said == ["from b.safetensors"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("long", "error: too long"),
        ("/save a", "error: nothing to save"),
        ("/save", "error: /save needs the name of a file"),
        ("/load", "error: /load needs the name of a file"),
        ("/fork 2", "error: There are the conversations 1 to 1. Received: /fork 2"),
        ("/forks", "error: There is no command /forks. /help lists them."),
    ],
)
def test_after_an_error_the_conversation_goes_on(monkeypatch, capsys, line, message):
    terminal = run(monkeypatch, line, "more")
    out, err = capsys.readouterr()
    assert message in err
    assert out == "more \n"
    assert terminal.failed


def type_in(monkeypatch, *typed, load=Echo):
    """Runs a terminal where somebody types; an exception is a key that raises it."""
    keys = iter([*typed, EOFError])

    def typing(prompt):
        print(prompt, end="")
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", typing)
    terminal = Terminal(Echo(), load)
    terminal.run()
    return terminal


def test_ctrl_c_ends_a_reply_and_not_the_program(monkeypatch, capsys):
    terminal = type_in(monkeypatch, "one interrupted two", "interrupted", "three")
    assert capsys.readouterr().out == "one \nthree \n"
    assert terminal.chat.said == ["three"]
    assert not terminal.failed


def test_ctrl_c_ends_a_command_and_not_the_program(monkeypatch, capsys):
    def interrupted(file):
        raise KeyboardInterrupt

    terminal = type_in(monkeypatch, "one", "/load a", "two", load=interrupted)
    assert terminal.chat.said == ["one", "two"]
    assert "stopped" in capsys.readouterr().err


def test_ctrl_c_ends_lines_of_a_pipe(monkeypatch, capsys):
    """Half of a reply is not taken for a whole one."""
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "one interrupted two", "three")
    assert capsys.readouterr().out == "one "


def test_nobody_reads_the_replies_any_more(monkeypatch):
    def broken(*args, **options):
        raise BrokenPipeError

    monkeypatch.setattr(builtins, "print", broken)
    with pytest.raises(BrokenPipeError):
        run(monkeypatch, "one", "two")


def test_at_a_prompt_ctrl_c_tells_how_to_end(monkeypatch, capsys):
    type_in(monkeypatch, KeyboardInterrupt, "one", "")
    out, err = capsys.readouterr()
    assert out == "one \n"  # which is no terminal: the prompt is elsewhere
    assert err.startswith("/help lists the commands.\n> ")
    assert "/quit or Ctrl-D to end" in err


def test_paths_are_what_a_shell_would_make_of_them(monkeypatch, capsys):
    terminal = run(monkeypatch, "/load ~/a b.safetensors")
    assert terminal.chat.said == [f"from {os.path.expanduser('~')}/a b.safetensors"]


def test_notes_show_names_as_they_are(monkeypatch, capsys):
    run(monkeypatch, "a:b:c [/b] \x1b[2J", "/undo")
    assert "taken back: a:b:c [/b] \N{REPLACEMENT CHARACTER}[2J" in capsys.readouterr().err


def test_nothing_that_a_model_writes_steers_the_terminal():
    assert shown("a\x1b[2Jb\rc\x07\n\té🤷🏽‍♀️") == "a�[2Jb�c�\n\té🤷🏽‍♀️"
