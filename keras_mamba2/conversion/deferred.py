"""Models without values, for those who fill them themselves."""

import contextlib
import contextvars
from collections.abc import Iterable
from collections.abc import Iterator

import keras

from keras_mamba2._compat.keras_variables import has_value
from keras_mamba2._compat.keras_variables import initialize
from keras_mamba2._compat.keras_variables import initialize_deferred
from keras_mamba2._compat.keras_variables import keep_pending_initializations
from keras_mamba2._compat.keras_variables import pending_initializations

_being_loaded: contextvars.ContextVar[list[keras.Variable] | None] = contextvars.ContextVar(
    "being_loaded", default=None
)


@contextlib.contextmanager
def deferred_initialization() -> Iterator[list[keras.Variable]]:
    """Variables created here have no values, which would take long to draw.

    Yields:
        A list, which has them in the end.
    """
    created: list[keras.Variable] = []
    # Or the next scope that ends would draw values for them.
    with keep_pending_initializations():
        before = len(pending_initializations())
        with keras.StatelessScope(initialize_variables=False):
            yield created
        created += pending_initializations()[before:]


@contextlib.contextmanager
def loading() -> Iterator[list[keras.Variable]]:
    """Backbones that are built here are filled from files afterwards.

    Yields:
        A list, which has their variables in the end.
    """
    created: list[keras.Variable] = []
    token = _being_loaded.set(created)
    try:
        yield created
    finally:
        _being_loaded.reset(token)


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Around what makes the variables of a backbone: without values, in `loading`."""
    created = _being_loaded.get()
    if created is None:
        yield
        return
    with deferred_initialization() as variables:
        yield
    created += variables


def set_value(variable: keras.Variable, value) -> None:
    """`variable.assign(value)`, also where it has none yet."""
    if has_value(variable):
        variable.assign(value)
    else:
        initialize(variable, value)


def initialize_the_rest(variables: Iterable[keras.Variable]) -> None:
    """Gives initial values to variables that have none."""
    for variable in variables:
        if not has_value(variable):
            initialize_deferred(variable)
