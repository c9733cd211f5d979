"""What a template may take: bounds on the time, and on what is made.

The time is looked at in each round of a loop and with each call, operator and filter. How long a
text would be is known before it is made: a short list of long lists may have gigabytes. Not bounded
are one comparison of such lists, and what many texts take together.
"""

import contextlib
import contextvars
import dataclasses
import re
import time
import types
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from jinja2 import sandbox
from jinja2 import utils

SECONDS = 10
MOST_CHARACTERS = 10_000_000
# What a macro writes is written again by its caller.
MOST_WRITTEN = 10 * MOST_CHARACTERS
MOST_BITS = 10_000
# Of filters that take more than proportional time.
MOST_FOR_SLOW = 100_000
SLOW = ("striptags", "sum", "urlize", "wordwrap")
# Filters of Jinja, and methods of strings and numbers, that take a length.
PADDING = ("batch", "center", "ljust", "rjust", "slice", "to_bytes", "zfill")
PADDING_LINES = ("expandtabs", "indent")
# Filters that make no text of what they are given.
NO_TEXT = ("attr", "count", "d", "default", "dictsort", "first", "groupby", "items", "last")
NO_TEXT += ("length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse")
NO_TEXT += ("select", "selectattr", "sort", "unique")
FIELDS = re.compile(r"%(?:\(.*?\))?[-#0 +\d*.]*")  # of `%`


@dataclasses.dataclass
class Run:
    """What one rendering may take, and has taken."""

    deadline: float
    written: int = 0


_run: contextvars.ContextVar[Run] = contextvars.ContextVar("run")


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """What is rendered inside has `SECONDS` from now on."""
    token = _run.set(Run(time.monotonic() + SECONDS))
    try:
        yield
    finally:
        _run.reset(token)


def tick(num_characters: int = 0) -> str:
    """Looks at the time, and counts what is written, if only into a variable."""
    run = _run.get()
    run.written += num_characters
    if time.monotonic() > run.deadline:
        raise sandbox.SecurityError(f"it takes longer than {SECONDS} seconds")
    if run.written > MOST_WRITTEN:
        raise sandbox.SecurityError(f"it writes more than {MOST_WRITTEN:,} characters")
    return ""


def check_size(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise sandbox.SecurityError(f"it makes more than {MOST_CHARACTERS:,} characters")


def size_of(value) -> int:
    """About how many characters `value` is as a text, a list as often as it is in others.

    Raises:
        jinja2.sandbox.SecurityError: as soon as it is more than there may be.
    """
    size, left = 0, [value]
    while left:
        value = left.pop()
        if isinstance(value, (str, bytes)):
            size += len(value)
        elif isinstance(value, int):
            size += 1 + value.bit_length() // 4
        elif isinstance(value, utils.Namespace):
            raise sandbox.SecurityError("it makes a text of a namespace")
        elif isinstance(value, Collection) and not isinstance(value, range):
            size += 1 + len(value)
            check_size(size)
            left.extend(value)
            left.extend(value.values() if isinstance(value, Mapping) else ())
        else:
            size += 1
        check_size(size)
    return size


def checked(value):
    """What a call has given, if it is not huge. What comes item by item is looked at then."""
    if isinstance(value, (str, bytes, list)):
        check_size(len(value))
    return limited(value) if isinstance(value, types.GeneratorType) else value


def limited(items: Iterator[Any]) -> Iterator[Any]:
    """What a filter gives item by item."""
    size = 0
    for item in items:
        tick()
        size += len(item) if isinstance(item, (str, bytes, list)) else 1
        check_size(size)
        yield item


def written(value):
    """A value that is to be written."""
    tick(size_of(value))
    return value


def concatenate(*parts) -> str:
    """What `~` makes."""
    check_size(sum(map(size_of, parts)))
    return "".join(map(str, parts))


def check_call(name: str, *values) -> tuple[Any, ...]:
    """Raises where something huge is asked for, before it is made. Returns the values.

    Args:
        name: string, of a filter or a method.
        *values: what it is given; the first is the one that is filtered, or has the method.
    """
    if name == "join" and isinstance(values[0], Iterator):  # of what it will give
        values = (list(values[0]), *values[1:])
    if name in NO_TEXT or not values:
        return values
    text, *others = values
    if name == "sum":
        others = [v for v in others if isinstance(v, list)]
        if not others:
            return values
    size = sum(map(size_of, values))
    widths = sum(abs(v) for v in others if isinstance(v, int))
    texts = [v for v in others if isinstance(v, (str, bytes))]
    if name in PADDING:
        check_size(widths)
    elif name in PADDING_LINES:
        lines = _text(text)
        check_size((lines.count("\n") + lines.count("\t") + 1) * (widths + sum(map(len, texts))))
    elif name == "join" and others and isinstance(text, Collection):
        check_size(len(text) * size_of(others[0]))
    elif name == "replace" and len(others) > 1:
        old, new = map(_text, others[:2])
        check_size(_text(text).count(old) * len(new))
    elif name == "translate":
        check_size(size_of(text) * max(map(size_of, others), default=0))
    elif name == "format":
        check_percent(_text(text), tuple(others))
    elif name in SLOW and size > MOST_FOR_SLOW:
        raise sandbox.SecurityError(f"`{name}` is for at most {MOST_FOR_SLOW:,} characters")
    return values


def check_percent(text: str | bytes, values) -> None:
    """Raises where `text % values` would be huge."""
    fields = FIELDS.findall(_text(text))
    widths = sum(int(digits) for field in fields for digits in re.findall(r"\d+", field))
    several = values if isinstance(values, tuple) else (values,)
    if any("*" in field for field in fields):
        widths += sum(abs(value) for value in several if isinstance(value, int))
    # Fields with names may name the same one.
    times = len(fields) if isinstance(values, Mapping) else 1
    check_size(widths + times * sum(map(size_of, several)))


def _text(value) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def count(value) -> int:
    """The length of a sequence, and a number itself."""
    return len(value) if hasattr(value, "__len__") else int(value)
