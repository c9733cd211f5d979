"""What an argument may be. An error names it and what it must be, before work is done.

A `Kind` is called with a name and a value, and returns the value as Python's own type:

    SIZE("head_dim", np.int64(8))  # 8
    SIZE("head_dim", 0)  # ValueError: `head_dim` must be a positive integer. Received: head_dim=0
"""

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import operator
import os
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

# What float32 holds, in which most numbers end.
LARGEST = float(np.finfo("float32").max)
LONGEST_REPR = 200


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of argument.

    Args:
        description: string, what comes after "must be".
        standard: function of a value that returns it as Python's own type, and raises TypeError,
            ValueError or OverflowError for one that is not of this kind.
        names: strings, the only values, where there are such.
    """

    description: str
    standard: Callable[[Any], Any]
    names: Sequence[str] = ()

    def __call__(self, name: str, value: Any) -> Any:
        try:
            return self.standard(value)
        except (TypeError, ValueError, OverflowError):
            hint = did_you_mean(value, self.names)
            raise ValueError(
                f"`{name}` must be {self.description}.{hint} Received: {name}={shown(value)}"
            ) from None


def integer(at_least: int | None = None, at_most: int | None = None) -> Kind:
    """An integer, also one of numpy's. A bool is none, nor is a float."""

    def standard(value):
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return _in_range(operator.index(value), at_least, None, at_most, None)

    return Kind("an integer" + _range(at_least, None, at_most, None), standard)


def number(
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Kind:
    """A number that float32 can hold: finite, not NaN. A bool is none."""

    def standard(value):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
        if not math.isfinite(value) or abs(value) > LARGEST:
            raise ValueError
        return _in_range(value, at_least, above, at_most, below)

    return Kind("a finite number" + _range(at_least, above, at_most, below), standard)


def choice(*names: str) -> Kind:
    """One of some names."""

    def standard(value):
        if not isinstance(value, str) or value not in names:
            raise ValueError
        return value

    return Kind(f"one of {', '.join(map(repr, names))}", standard, names)


def several(kind: Kind, count: int | None = None, in_order: bool = False) -> Kind:
    """A sequence of values of one kind, as a tuple; in order, each is at least the one before."""

    def standard(value):
        is_sequence = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)
        if not is_sequence or count not in (None, len(value)):
            raise TypeError
        values = tuple(map(kind.standard, value))
        if in_order and list(values) != sorted(values):
            raise ValueError
        return values

    many = "a sequence of values" if count is None else f"{count} values"
    order = ", in order" if in_order else ""
    return Kind(f"{many}, each {kind.description}{order}", standard)


def instance(cls: type | tuple[type, ...], description: str | None = None) -> Kind:
    """An object of a class, or of one of several."""

    def standard(value):
        if not isinstance(value, cls):
            raise TypeError
        return value

    classes = cls if isinstance(cls, tuple) else (cls,)
    return Kind(description or " or ".join(f"a `{c.__name__}`" for c in classes), standard)


def optional(kind: Kind) -> Kind:
    def standard(value):
        return None if value is None else kind.standard(value)

    return Kind(f"{kind.description}, or None", standard, kind.names)


def _boolean(value):
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError
    return bool(value)


def check_attributes(owner, **kinds: Kind) -> None:
    """Replaces attributes of `owner` by what their kinds make of them."""
    for name, kind in kinds.items():
        setattr(owner, name, kind(name, getattr(owner, name)))


def check_keywords(cls: type, keywords: Mapping[str, Any], *more: str) -> None:
    """Refuses keywords that are not known, as `check_names`, and values that Keras cannot take."""
    check_names(cls, keywords, *more)
    for name, kind in OF_KERAS.items():
        if name in keywords:
            kind(name, keywords[name])


def check_names(cls: type, keywords: Iterable[str], *more: str) -> None:
    """Refuses keywords that neither `__init__` of `cls` and its bases, nor `more`, have."""
    known = (*_keywords(cls), *more)
    for keyword in keywords:
        if keyword not in known:
            hint = did_you_mean(keyword, known)
            own = ", ".join(dict.fromkeys((*_keywords_of(_inits(cls)[0]), *OF_KERAS, *more)))
            raise ValueError(
                f"`{cls.__name__}` has no argument `{keyword}`.{hint} Its arguments are {own}."
            )


@functools.cache
def _keywords(cls: type) -> tuple[str, ...]:
    """What `__init__` of a class and its bases have names for."""
    return tuple(name for init in _inits(cls) for name in _keywords_of(init))


def _inits(cls: type) -> list[Callable]:
    """`__init__` of a class, then of its bases."""
    return [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]


def _keywords_of(init: Callable) -> list[str]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(init).parameters.values())[1:]  # without `self`
    return [parameter.name for parameter in parameters if parameter.kind in named]


def check_elements(values: np.ndarray, is_valid: np.ndarray, must: str) -> None:
    """Raises with what elements of an array must be, and the first that is not valid."""
    wrong = np.argwhere(~is_valid)
    if len(wrong):
        raise ValueError(f"{must} Received: {values[tuple(wrong[0])]} in row {wrong[0][0]}")


def check_numeric(what: str, values: np.ndarray) -> None:
    """Raises for an array of strings, objects or complex numbers."""
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{what} must be numbers. Received: dtype={values.dtype}")


def are_ids(values: np.ndarray, size: int) -> np.ndarray:
    """Which of the values are whole numbers from 0 up to `size`, not included."""
    # In this form since comparisons with NaN are false.
    in_range = (values >= 0) & (values < size)
    return in_range if values.dtype.kind in "biu" else in_range & (values == np.floor(values))


def did_you_mean(value: Any, names: Iterable[str]) -> str:
    """A sentence with the name that is nearest to `value`; empty where none is near."""
    near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f" Did you mean {near[0]!r}?" if near else ""


def shown(value: Any) -> str:
    """`repr(value)`, cut where it is long."""
    try:
        text = repr(value[:LONGEST_REPR] if isinstance(value, (str, bytes)) else value)
    except Exception:  # as of an integer with more digits than Python writes
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= LONGEST_REPR else text[:LONGEST_REPR] + " ..."


def _in_range(value, at_least, above, at_most, below):
    if (
        (at_least is not None and value < at_least)
        or (above is not None and value <= above)
        or (at_most is not None and value > at_most)
        or (below is not None and value >= below)
    ):
        raise ValueError
    return value


def _range(at_least, above, at_most, below) -> str:
    """In words of mathematics: " >= 0", " in [0, 1)"."""
    low = at_least if above is None else above
    high = at_most if below is None else below
    if low is None and high is None:
        return ""
    if high is None:
        return f" {'>=' if above is None else '>'} {low}"
    if low is None:
        return f" {'<=' if below is None else '<'} {high}"
    return f" in {'[' if above is None else '('}{low}, {high}{']' if below is None else ')'}"


def _policy(value):
    import keras  # what has no Keras, such as exported programs, checks its arguments here too

    return value if value is None else keras.dtype_policies.get(value)


BOOLEAN = Kind("True or False", _boolean)
STRING = instance(str, "a string")
PATH = instance((str, os.PathLike), "a path")
SIZE = dataclasses.replace(integer(at_least=1), description="a positive integer")
SEED = integer(at_least=0, at_most=2**32 - 1)
POSITIVE = number(above=0)
RATE = number(at_least=0, below=1)
# What layers and models of all kinds take.
OF_KERAS = {
    "name": optional(STRING),
    "dtype": Kind("a dtype or a dtype policy, or None", _policy),
    "trainable": BOOLEAN,
}
