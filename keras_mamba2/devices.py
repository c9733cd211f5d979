"""The current `keras.distribution`: leaving it for a while, and what it cannot cut."""

import contextlib
from collections.abc import Iterator

import keras


@contextlib.contextmanager
def undistributed() -> Iterator[None]:
    """Without the current distribution."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


def check_batches(num_rows: int, batch_size: int | None) -> None:
    """Raises if the devices of this process would get unequal parts of a batch, which JAX refuses.

    Args:
        num_rows: int, of all batches together.
        batch_size: int, `None` for Keras' 32.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or keras.config.backend() != "jax":
        return
    import jax

    mesh = distribution.device_mesh
    devices = mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]
    devices = devices // jax.process_count() or 1  # each process has rows of its own
    batch_size = batch_size or 32
    last = num_rows % batch_size
    for size, which in ((min(batch_size, num_rows), "a batch"), (last, "the last batch")):
        if size % devices:
            raise ValueError(
                f"{devices} devices share the rows of a batch, and {which} has {size}: there are "
                f"{num_rows} rows in batches of {batch_size}. Leave out rows or add some, or "
                "choose another batch size, so that the devices divide every batch."
            )
