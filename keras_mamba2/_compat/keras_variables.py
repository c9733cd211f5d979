"""Private parts of `keras.Variable`."""

import contextlib
from collections.abc import Iterator

import keras
from keras.src.backend.common import global_state

PENDING = "uninitialized_variables"


def has_value(variable: keras.Variable) -> bool:
    """Whether `variable` has a value; one that was created in a `StatelessScope` has none.

    `_value`, since `value` draws one where there is none. Written for Keras 3.15.
    """
    return variable._value is not None


def initialize(variable: keras.Variable, value) -> None:
    """Gives `variable`, which has no value, its first one: an array of its shape and dtype.

    In a distribution each device gets its part of it, and none the whole.

    `_initialize` and `_initializer`, since `assign` wants a value there. Written for Keras 3.15.
    """
    # Keras puts an array of numpy on the devices by the variable's layout, and takes a tensor
    # from the one on which it lies.
    is_laid_out = keras.config.backend() == "jax" and keras.distribution.distribution() is not None
    if not is_laid_out:
        value = keras.ops.convert_to_tensor(value, dtype=variable.dtype)
    variable._initialize(value)
    variable._initializer = None


def take_value(variable: keras.Variable, why: str) -> None:
    """Leaves `variable` without its value; to read it or to set one raises `ValueError(why)`.

    `_value`, `_initializer`, which draws a value where there is none, `_initialize` and
    `_direct_assign`. Written for Keras 3.15.
    """

    def refuse(*args, **kwargs):
        raise ValueError(why)

    variable._value = None
    variable._initializer = variable._initialize = variable._direct_assign = refuse


def initialize_deferred(variable: keras.Variable) -> None:
    """Gives `variable`, which has no value, the one that its initializer draws.

    `_deferred_initialize`, since Keras calls it by itself only when a scope ends. Written for
    Keras 3.15.
    """
    variable._deferred_initialize()


def pending_initializations() -> list[keras.Variable]:
    """The variables that Keras will initialize when the next `StatelessScope` ends.

    The global attribute `uninitialized_variables`. Written for Keras 3.15.
    """
    return list(global_state.get_global_attribute(PENDING) or [])


@contextlib.contextmanager
def keep_pending_initializations() -> Iterator[None]:
    """Makes Keras forget to initialize the variables that are created inside.

    The global attribute `uninitialized_variables`, since no argument of `StatelessScope` leaves
    variables out of it. Written for Keras 3.15.
    """
    pending = pending_initializations()
    try:
        yield
    finally:
        global_state.set_global_attribute(PENDING, pending)


def never_autocast(variable: keras.Variable) -> None:
    """Keeps the dtype of `variable` inside layers that compute in another.

    `_autocast`, since `autocast=False` is an argument of `add_weight`, which Keras calls here.
    Written for Keras 3.15.
    """
    variable._autocast = False
