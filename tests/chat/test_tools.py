"""The schema of a function is that of transformers."""

import enum
from typing import Any
from typing import Literal
from typing import Optional

import pytest
from transformers.utils import get_json_schema

from keras_mamba2.chat import tool_schema


class Unit(enum.Enum):
    celsius = "c"
    kelvin = 1


def weather(city: str, days: int = 1, unit: Unit = Unit.celsius) -> str:
    """The weather to come.

    It is not
    always right.

    Args:
        city: Name of the city,
            as people there write it
        days (int): How many days: 1 to 9
        unit: What is measured in

    Returns:
        One line a day.
    """


def cancel(reason: Optional[str], when: Literal["now", "later", None]) -> None:  # noqa: UP045
    """Cancels the order.

    Args:
        reason: Why
        when: How soon
    """


def nothing():
    """Does nothing."""


def drink(
    beverage: str,
    sizes: list[int],
    names: dict[str, list[float]],
    pair: tuple[int, str],
    any: Any,
    either: int | str | None,
    mixed: list[int] | dict[str, bool],
    same: list | tuple | None = None,
    plain: dict | None = None,
) -> list[dict[str, Any]]:
    """
    Orders a drink.

    Args:
        beverage: What to drink (choices: ["tea", " coffee "])
        sizes: of cups
        names:
            of all who drink

            and of the others
        pair: Two things
        any: Anything
        either: a number or a name
        mixed: this or that
        same: x
        plain: y
    Raises:
        ValueError: if empty
    """


class Shop:
    def open(self, hour: float) -> "Shop":
        """Opens the shop.

        Args:
            hour: When
        Returns:
            The shop.
        """


@pytest.mark.parametrize(
    "function", [weather, cancel, nothing, drink, Shop().open], ids=lambda f: f.__name__
)
def test_schemas_are_those_of_transformers(function):
    assert tool_schema(function) == get_json_schema(function)


def no_docstring(a: int):
    pass


def no_hint(a):
    """Says a.

    Args:
        a: what is said
    """


def not_described(a: int):
    """Says a."""


def no_json(a: bytes):
    """Says a.

    Args:
        a: what is said
    """


def any_length(a: tuple[int, ...]):
    """Says a.

    Args:
        a: what is said
    """


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_docstring, "no_docstring needs a docstring"),
        (no_hint, "no_hint needs a type hint.*none for 'a'"),
        (not_described, "not_described must describe.*none for 'a'"),
        (no_json, "The tool no_json: There is no JSON for the type <class 'bytes'>"),
        (any_length, "any_length: There is no JSON"),
        (len, "a JSON schema or a function. Received: <built-in"),
    ],
)
def test_functions_that_cannot_be_described_are_named(function, message):
    with pytest.raises(ValueError, match=message):
        tool_schema(function)
