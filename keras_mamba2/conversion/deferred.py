"""Models without values, for those who fill them themselves."""

import contextlib
from collections.abc import Iterable
from collections.abc import Iterator

import keras
from keras.src.backend.common import global_state

PENDING = "uninitialized_variables"


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Variables created here have no values, which would take long to draw."""
    pending = list(global_state.get_global_attribute(PENDING) or [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Or the next scope that ends would draw values for them.
        global_state.set_global_attribute(PENDING, pending)


def has_value(variable: keras.Variable) -> bool:
    return variable._value is not None


def set_value(variable: keras.Variable, value) -> None:
    """`variable.assign(value)`, also where it has none yet."""
    if has_value(variable):
        variable.assign(value)
    else:
        variable._initialize(keras.ops.convert_to_tensor(value, dtype=variable.dtype))
        variable._initializer = None


def initialize_the_rest(variables: Iterable[keras.Variable]) -> None:
    """Gives initial values to variables that have none."""
    for variable in variables:
        if not has_value(variable):
            variable._deferred_initialize()
