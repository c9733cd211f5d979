"""The batches of prompts that `generate` reads."""

from collections.abc import Iterator
from typing import Any

from keras_mamba2.tasks.packing import is_dataset


def batches(inputs: Any) -> Iterator[Any]:
    """The batches of prompts in `inputs`: the elements of a dataset, else all as one batch."""
    if not is_dataset(inputs):
        yield inputs
    elif hasattr(inputs, "as_numpy_iterator"):
        yield from inputs.as_numpy_iterator()
    else:
        yield from inputs
