"""Values that are none of what an argument may be, and how they are refused."""

import math
import pathlib
import traceback
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from unittest import mock

import keras
import pytest

import keras_mamba2

NAN, INF = math.nan, math.inf
PACKAGE = str(pathlib.Path(keras_mamba2.__file__).parent)

# Of each kind of argument: values that are not of it.
NO_INTEGER = [2.0, "5", NAN, True, [3], 1.5, b"3", {}]
NO_SIZE = [*NO_INTEGER, None, 0, -1]
NO_OPTIONAL_SIZE = [*NO_INTEGER, 0, -1]
NO_NUMBER = [NAN, INF, -INF, "1", [1.0], True, None, 1e39, 10**400, 1j]
NO_POSITIVE = [*NO_NUMBER, 0, -1e-5]
NO_RATE = [*NO_NUMBER, 1, -0.1, 1.5]
NO_BOOLEAN = ["no", "", 0, 1, None, NAN, []]
NO_STRING = [3, b"a", NAN, ["a"], {}]
NO_PAIR = [(1, 0), (NAN, 1), (-1, -2), (1, NAN), 3, "12", (1,), (1, 2, 3), {1: 2, 3: 4}, ("1", "2")]
NO_DTYPE = ["floot", 3, [], "int7"]


def cases(table: Mapping[str, list]) -> list[tuple[str, Any]]:
    """Each value of a table, with the name of its argument."""
    return [(name, value) for name, values in table.items() for value in values]


def named(table: Mapping[str, list]):
    """Parametrizes a test of `(name, value)`."""
    return pytest.mark.parametrize(
        ("name", "value"), cases(table), ids=lambda value: ascii(value)[:40]
    )


def assert_refused(call: Callable, /, *args, match: str, **kwargs) -> None:
    """`call` raises, in a file of this package, what matches, and makes no variable before."""
    no_variables = mock.patch.object(
        keras.Variable, "__init__", side_effect=AssertionError("a variable is made")
    )
    with no_variables, pytest.raises(ValueError, match=match) as error:
        call(*args, **kwargs)
    raised_in = traceback.extract_tb(error.value.__traceback__)[-1].filename
    assert raised_in.startswith(PACKAGE), f"raised in {raised_in}: {error.value}"


def assert_argument_refused(call: Callable, argument: str, /, **arguments) -> None:
    """As `assert_refused`, with the argument's name and value in the message."""
    assert_refused(call, match=f"(?s)Received: .*{argument}=", **arguments)
