"""What an argument may be: every value comes back as Python's own type, or is named."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mamba2 import arguments
from keras_mamba2.arguments import choice
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import number
from keras_mamba2.arguments import optional
from keras_mamba2.arguments import several
from tests.bad_values import NO_BOOLEAN
from tests.bad_values import NO_INTEGER
from tests.bad_values import NO_NUMBER
from tests.bad_values import NO_PAIR
from tests.laws import examples

NUMPY_INTEGERS = [np.int8, np.int32, np.int64, np.uint8, np.uint64]
ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
    | st.lists(st.integers() | st.floats() | st.none(), max_size=3)
    | st.dictionaries(st.text(), st.integers(), max_size=2)
    | st.tuples(st.floats(), st.floats())
)


def outcome(kind, value):
    """What a kind makes of a value, or the message that refuses it."""
    try:
        return kind("name", value), None
    except ValueError as error:
        return None, str(error)


@examples(300)
@given(value=ANYTHING, low=st.none() | st.integers(-9, 9), high=st.none() | st.integers(-9, 9))
def test_an_integer_is_one_in_its_range_and_all_else_is_named(value, low, high):
    found, message = outcome(integer(low, high), value)
    is_one = type(value) is int
    fits = is_one and (low is None or value >= low) and (high is None or value <= high)
    if fits:
        assert found == value
        assert type(found) is int
    else:
        assert message.startswith("`name` must be an integer")
        assert "Received: name=" in message


@examples(300)
@given(value=ANYTHING, bounds=st.tuples(st.floats(-9, 9), st.floats(-9, 9)), open=st.booleans())
def test_a_number_is_finite_and_in_its_range_and_all_else_is_named(value, bounds, open):
    low, high = bounds
    kind = number(above=low, below=high) if open else number(at_least=low, at_most=high)
    found, message = outcome(kind, value)
    fits = type(value) in (int, float) and (low < value < high if open else low <= value <= high)
    if fits:
        assert found == value
        assert type(found) is type(value)
    else:
        assert message.startswith("`name` must be a finite number in ")


@examples(300)
@given(value=ANYTHING)
def test_every_kind_returns_what_it_takes_again_or_raises_one_error(value):
    kinds = [
        arguments.BOOLEAN,
        arguments.STRING,
        arguments.PATH,
        arguments.SEED,
        choice("a", "b"),
        optional(arguments.SIZE),
        several(number(), 2, in_order=True),
        several(optional(arguments.RATE)),
        *arguments.OF_KERAS.values(),
    ]
    for kind in kinds:
        found, message = outcome(kind, value)
        if message is None:
            again, _ = outcome(kind, found)
            assert again == found
        else:
            assert kind.description in message
            assert len(message) < 500


@pytest.mark.parametrize("dtype", NUMPY_INTEGERS)
def test_integers_of_numpy_become_python_s(dtype):
    found = integer()("name", dtype(7))
    assert (found, type(found)) == (7, int)
    assert type(number()("name", dtype(7))) is int


def test_other_numbers_of_numpy_become_python_s():
    assert type(number()("name", np.float16(0.5))) is float
    assert type(arguments.BOOLEAN("name", np.bool_(True))) is bool
    assert several(integer())("name", np.arange(3)) == (0, 1, 2)


@pytest.mark.parametrize("value", NO_INTEGER, ids=repr)
def test_what_is_no_integer(value):
    with pytest.raises(ValueError, match=f"Received: name={re.escape(repr(value))}"):
        integer()("name", value)


@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda value: repr(value)[:20])
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match="`name` must be a finite number. Received: name="):
        number()("name", value)


@pytest.mark.parametrize("value", NO_PAIR, ids=repr)
def test_what_is_no_pair_in_order(value):
    with pytest.raises(ValueError, match="2 values, each a finite number >= 0, in order"):
        several(number(at_least=0), 2, in_order=True)("name", value)


@pytest.mark.parametrize("value", NO_BOOLEAN, ids=repr)
def test_what_is_no_bool(value):
    with pytest.raises(ValueError, match="`name` must be True or False"):
        arguments.BOOLEAN("name", value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (integer(), "an integer"),
        (integer(at_least=2), "an integer >= 2"),
        (integer(at_most=2), "an integer <= 2"),
        (integer(0, 3), "an integer in [0, 3]"),
        (number(above=0), "a finite number > 0"),
        (number(below=0.5), "a finite number < 0.5"),
        (number(at_least=0, below=1), "a finite number in [0, 1)"),
        (number(above=0, at_most=1), "a finite number in (0, 1]"),
        (optional(choice("a", "b")), "one of 'a', 'b', or None"),
        (several(number()), "a sequence of values, each a finite number"),
    ],
)
def test_kinds_in_words(kind, words):
    assert kind.description == words


def test_a_name_close_to_a_known_one_is_suggested():
    with pytest.raises(ValueError, match="`s` must be one of .* Did you mean 'greedy'. Received"):
        choice("greedy", "random")("s", "gredy")
    with pytest.raises(ValueError, match="one of 'greedy', 'random'. Received: s='abc'"):
        choice("greedy", "random")("s", "abc")


def test_a_long_value_is_cut():
    for value in ("x" * 10**6, b"x" * 10**6, list(range(10**5)), 10**4000, 10**5000):
        assert len(arguments.shown(value)) < 250


class Base:
    def __init__(self, size, *, scale=1.0, **kwargs):
        pass


class Derived(Base):
    def __init__(self, depth, *args, **kwargs):
        pass


def test_keywords_are_those_of_a_class_and_its_bases():
    arguments.check_names(Derived, ["depth", "size", "scale", "more"], "more")
    with pytest.raises(ValueError, match="`Derived` has no argument `scal`. Did you mean 'scale'"):
        arguments.check_names(Derived, ["scal"])
    with pytest.raises(ValueError, match="`Derived` has no argument `args`"):
        arguments.check_names(Derived, ["args"])
    with pytest.raises(ValueError, match="`name` must be a string, or None. Received: name=3"):
        arguments.check_keywords(Derived, {"name": 3}, "name")


def test_elements_are_named_with_their_row():
    values = np.array([[1.0, 2.0], [3.0, math.nan]])
    with pytest.raises(ValueError, match="All must be finite. Received: nan in row 1"):
        arguments.check_elements(values, np.isfinite(values), "All must be finite.")


@examples(200)
@given(value=st.integers(-5, 300) | st.floats(width=32), size=st.integers(1, 256))
def test_ids_are_whole_numbers_below_a_size(value, size):
    expected = math.isfinite(value) and value == int(value) and 0 <= value < size
    assert arguments.are_ids(np.array([value]), size).tolist() == [expected]
