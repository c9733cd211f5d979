import pathlib
import zlib
from typing import NamedTuple

import ml_dtypes
import numpy as np

MOST_AXES = 64  # of numpy
ROWS_AT_ONCE = 1024
LFS_POINTER = b"version https://git-lfs"


class Storage(NamedTuple):
    """Bytes of a file, and the checksum that the file has of them."""

    file: pathlib.Path
    offset: int
    nbytes: int
    crc: int

    def is_sound(self) -> bool:
        """Whether the bytes are those that were written. Other threads can run meanwhile."""
        if self.nbytes == 0 or self.offset + self.nbytes > self.file.stat().st_size:
            return self.nbytes == self.crc == 0
        data = np.memmap(self.file, np.uint8, "r", offset=self.offset, shape=(self.nbytes,))
        return zlib.crc32(data.data) == self.crc


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file. Strides are in elements, `offset` is in bytes."""

    # A tuple, and not a class with a `__dict__`: a pickle can set attributes.
    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: Storage | None = None  # what it is a part of, in a file with checksums

    @classmethod
    def contiguous(cls, file, dtype, shape, offset) -> "StoredTensor":
        strides = [1]
        for size in shape[:0:-1]:
            strides.insert(0, strides[0] * size)
        return cls(file, dtype, shape, tuple(strides[: len(shape)]), offset)

    @property
    def extent(self) -> int:
        """How many elements lie between the first and the last, both counted."""
        if 0 in self.shape:
            return 0
        sizes = zip(self.shape, self.strides, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in sizes)

    @property
    def end(self) -> int:
        """The first byte in the file behind the tensor."""
        return self.offset + self.extent * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The array, read-only and memory-mapped: it costs memory only where it is touched."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        length = self.end - self.offset
        data = np.memmap(self.file, np.uint8, "r", offset=self.offset, shape=(length,))
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.ndarray(self.shape, self.dtype, buffer=data, strides=strides)


def same_bits(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are the same bit for bit, NaN included."""
    if a == b:
        return True  # one tensor in one file
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    x, y = (np.atleast_1d(tensor.read()) for tensor in (a, b))
    parts = (slice(i, i + ROWS_AT_ONCE) for i in range(0, len(x), ROWS_AT_ONCE))
    return all(x[part].tobytes() == y[part].tobytes() for part in parts)


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a Keras dtype; numpy itself knows no bfloat16."""
    return np.dtype(getattr(ml_dtypes, name, name))


def check_not_pointer(file: pathlib.Path) -> None:
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file} is a Git LFS pointer. Fetch the file with `git lfs pull`.")
