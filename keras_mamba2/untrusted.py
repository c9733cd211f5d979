"""Reading what others wrote: within bounds, and with errors that name the file and can be printed.

A file may be anything: a pipe, a folder, a gigabyte of brackets. Here it is a `ValueError`.
"""

import json
import os
import pathlib
import reprlib
import stat
import unicodedata
from collections.abc import Collection
from typing import Any

# More than any configuration or index has, and what JSON makes of it still fits into memory.
LARGEST_JSON = 16_000_000
LARGEST_TOKENIZER = 64_000_000  # that of Nemotron 3 has 17
LONGEST_TEXT = 300  # of a value in an error

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 100
vars(_repr)["repr_OrderedDict"] = _repr.repr_dict


def shortened(value: Any, longest: int = LONGEST_TEXT) -> str:
    """`value` for an error: `repr`, or a text as it is, but never long."""
    text = value if isinstance(value, str) else _repr.repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def shown(text: str) -> str:
    """`text` without what would steer a terminal."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def some(names: Collection[str], count: int = 20) -> str:
    """The first of `names`, and how many more there are; "none" without any."""
    shown = ", ".join(shortened(name) for name in list(names)[:count])
    more = len(names) - count
    return f"{shown} and {more} more" if more > 0 else shown or "none"


def is_folder(path) -> bool:
    """As `pathlib.Path.is_dir`; false also for a path that no file system takes."""
    try:
        return pathlib.Path(path).is_dir()
    except (OSError, ValueError):
        return False


def is_file(path) -> bool:
    """As `is_folder`, for ordinary files."""
    try:
        return pathlib.Path(path).is_file()
    except (OSError, ValueError):
        return False


def check_file(file) -> None:
    """Raises unless `file` is an ordinary file that is there: reading a pipe would wait for ever.

    Raises:
        ValueError: that names it.
    """
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        raise ValueError(f"{file} is missing.") from None
    except (OSError, ValueError) as error:  # a loop of links, a name with a zero in it
        raise ValueError(f"{shortened(str(file))} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ValueError(f"{file} is not a file: it is {kind}.")


def read_bytes(file, limit: int) -> bytes:
    """The content of `file`, which may have `limit` bytes.

    Raises:
        ValueError: that names it, if it is missing, no file, not readable or larger.
    """
    check_file(file)
    try:
        with open(file, "rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if len(data) > limit:
        raise ValueError(f"{file} is larger than {limit:,} bytes, and is not read.")
    return data


def read_json(file, limit: int = LARGEST_JSON) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        ValueError: that names the file, as `read_bytes`, and for anything but a JSON object.
    """
    value = parse_json(read_bytes(file, limit), f"{file} is truncated or not JSON")
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object. Received: {type(value).__name__}")
    return value


def parse_json(data: bytes, complaint: str) -> Any:
    """`data` as JSON.

    Raises:
        ValueError: that begins with `complaint`.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{complaint}: it is nested too deeply.") from None
    except ValueError as error:  # of the encoding, the syntax, a number of too many digits
        raise ValueError(f"{complaint}: {shortened(str(error))}") from error
