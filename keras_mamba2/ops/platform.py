"""What the programs that are traced now run on."""

import contextlib
import contextvars
from collections.abc import Iterator

_platform = contextvars.ContextVar[str | None]("platform", default=None)


def platform() -> str:
    """JAX's name of it: "cpu", "gpu", "tpu"; where programs are exported, "cuda" or "rocm"."""
    import jax

    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Programs that are traced here run on `platform`, whatever JAX runs on now."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)
