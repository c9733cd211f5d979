import functools
import threading
from collections.abc import Callable

_lock = threading.Lock()


def build_once(build: Callable) -> Callable:
    """Decorates `build` of a preprocessor, which threads of a `grain` pipeline call at once.

    Keras raises if a thread adds a sublayer when another thread has finished building.
    """

    @functools.wraps(build)
    def locked(self, input_shape):
        with _lock:
            if not self.built:
                build(self, input_shape)

    return locked
