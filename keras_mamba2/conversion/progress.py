from collections.abc import Collection
from typing import TypeVar

import tqdm.auto

T = TypeVar("T")

# In bytes. Below it the work is done before one could look.
LONG_WORK = 2**28


def progress(tensors: Collection[T], description: str, nbytes: int) -> Collection[T]:
    """`tensors` with a progress bar, if they are large together."""
    disable = nbytes < LONG_WORK
    return tqdm.auto.tqdm(tensors, desc=description, unit=" tensors", disable=disable)
