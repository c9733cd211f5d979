"""What the programs that are traced now run on."""

import contextlib
import contextvars
from collections.abc import Iterator

import keras

_platform = contextvars.ContextVar[str | None]("platform", default=None)


def platform() -> str:
    """JAX's name of it: "cpu", "gpu", "tpu"; where programs are exported, "cuda" or "rocm"."""
    import jax

    return _platform.get() or jax.default_backend()


def on_gpu() -> bool:
    """Whether programs of JAX are traced for a GPU."""
    return keras.config.backend() == "jax" and platform() in ("gpu", "cuda", "rocm")


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Programs that are traced here run on `platform`, whatever JAX runs on now."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)
