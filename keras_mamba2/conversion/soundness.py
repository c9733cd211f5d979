"""Whether weights are what was written, and numbers: checked while they are loaded."""

import contextlib
import os
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from keras_mamba2.conversion.stored_tensor import Storage
from keras_mamba2.conversion.stored_tensor import StoredTensor
from keras_mamba2.host.finite import FLOATS
from keras_mamba2.untrusted import some

MOST_THREADS = 4


@contextlib.contextmanager
def checksums_compared(tensors: Iterable[StoredTensor]) -> Iterator[None]:
    """Compares the checksums of what `tensors` are parts of, in other threads, until it is left.

    Raises:
        ValueError: that names the file, when it is left, if a checksum is another.
    """
    storages = sorted({tensor.storage for tensor in tensors if tensor.storage is not None})
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        sound = threads.map(Storage.is_sound, storages)
        yield
        damaged = [storage for storage, whole in zip(storages, sound, strict=True) if not whole]
    if damaged:
        raise ValueError(
            f"{damaged[0].file} is damaged: of {len(damaged)} of its {len(storages)} storages the "
            "checksum is another than when it was written. Get the file again; where torch wrote "
            "it without checksums, load and save it once with torch."
        )


def check_floats(folder, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises for tensors of integers or booleans, which are no weights."""
    others = [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in FLOATS]
    if others:
        raise ValueError(
            f"The weights in {folder} are not floating point numbers: {some(others)}. A quantized "
            "checkpoint must be converted back to floating point by the library that wrote it."
        )


def non_finite(name: str, array: np.ndarray) -> str:
    """For an error: how many of the numbers are what."""
    nan, infinite = np.count_nonzero(np.isnan(array)), np.count_nonzero(np.isinf(array))
    counts = [f"{count} {what}" for count, what in ((nan, "NaN"), (infinite, "infinite")) if count]
    return f"{name} ({' and '.join(counts)} of {array.size} in {array.dtype})"


def refuse_non_finite(source, found: list[str]) -> None:
    """Raises if `found`, of `non_finite`, is not empty."""
    if found:
        raise ValueError(
            f"{source} holds weights that are not finite numbers, and a model with them computes "
            f"NaN: {some(found)}. Get the files again, or repair them where they were written. "
            "Numbers that are infinite in float16 may fit into another dtype, as dtype='bfloat16'."
        )
