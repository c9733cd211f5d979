"""Models without values, for those who fill them themselves."""

import contextlib
from collections.abc import Iterable
from collections.abc import Iterator

import keras

from keras_mamba2._compat.keras_variables import has_value
from keras_mamba2._compat.keras_variables import initialize
from keras_mamba2._compat.keras_variables import initialize_deferred
from keras_mamba2._compat.keras_variables import keep_pending_initializations


@contextlib.contextmanager
def deferred_initialization() -> Iterator[None]:
    """Variables created here have no values, which would take long to draw."""
    # Or the next scope that ends would draw values for them.
    with keep_pending_initializations(), keras.StatelessScope(initialize_variables=False):
        yield


def set_value(variable: keras.Variable, value) -> None:
    """`variable.assign(value)`, also where it has none yet."""
    if has_value(variable):
        variable.assign(value)
    else:
        initialize(variable, keras.ops.convert_to_tensor(value, dtype=variable.dtype))


def initialize_the_rest(variables: Iterable[keras.Variable]) -> None:
    """Gives initial values to variables that have none."""
    for variable in variables:
        if not has_value(variable):
            initialize_deferred(variable)
