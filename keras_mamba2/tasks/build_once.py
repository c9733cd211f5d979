import functools
import threading
from collections.abc import Callable

_lock = threading.Lock()


def build_once(build: Callable) -> Callable:
    """For `build` of a preprocessor: the threads of a `grain` pipeline call it at the same time.

    Keras lets no thread add a sublayer after another has finished to build.
    """

    @functools.wraps(build)
    def locked(self, input_shape):
        with _lock:
            if not self.built:
                build(self, input_shape)

    return locked
