"""Reads `pytorch_model.bin` without torch, and without running what a pickle asks for.

Such a file is a zip archive: a pickle, `data.pkl`, and one uncompressed entry for each storage.
A pickle names functions to be called. Here a name stands for something harmless of our own, or
is refused before anything is called.
"""

import collections
import io
import pathlib
import pickle
import zipfile
from typing import BinaryIO
from typing import NamedTuple

import ml_dtypes
import numpy as np

from keras_mamba2.conversion.stored_tensor import StoredTensor

STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
ZIP_LOCAL_HEADER = 30  # bytes, before the name and the extra field of an entry


class _Refused(ValueError):
    """A pickle named something that a checkpoint does not need."""


class _Storage(NamedTuple):
    dtype: np.dtype
    offset: int  # in the file
    size: int  # in elements


def read_bin(file: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of one `.bin` file by name.

    Raises:
        ValueError: that names the file, if it is truncated, damaged, foreign, or its pickle
            names anything but dicts, tensors and storages. Nothing of the pickle has run then.
    """
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            truncated = stream.read(4) == b"PK\x03\x04"
        reason = "truncated" if truncated else "not a checkpoint in the zip format of torch >= 1.6"
        raise ValueError(f"{file} is {reason}.")
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            tensors = _Unpickler.of(file, archive, stream).load()
    except _Refused as error:
        raise ValueError(
            f"{file} is refused: its pickle names {error}, which is no part of a checkpoint. "
            "Nothing in it was run."
        ) from None
    # A damaged pickle can raise anything, from its opcodes or from what it passes to us.
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return _checked(file, tensors)


def _checked(file: pathlib.Path, tensors) -> dict[str, StoredTensor]:
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} must hold a dict of tensors, not a {type(tensors).__name__}.")
    tensors = dict(dict.items(tensors))  # a pickle can set an attribute `items`
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise ValueError(
                f"{file} must hold tensors by name. Received: {name!r}: {type(tensor).__name__}"
            )
    return tensors


class _Unpickler(pickle.Unpickler):
    file: pathlib.Path
    archive: zipfile.ZipFile
    stream: BinaryIO
    prefix: str

    @classmethod
    def of(cls, file, archive, stream) -> "_Unpickler":
        names = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(names) != 1:
            raise ValueError("it has no data.pkl")
        prefix = names[0].removesuffix("data.pkl")
        if prefix + "byteorder" in archive.namelist():
            order = archive.read(prefix + "byteorder")
            if order != b"little":
                raise ValueError(f"its byte order is {order!r}")
        _check_stored(archive.getinfo(names[0]))
        unpickler = cls(io.BytesIO(archive.read(names[0])))
        unpickler.file, unpickler.archive, unpickler.stream = file, archive, stream
        unpickler.prefix = prefix
        return unpickler

    def find_class(self, module, name):
        # What stands in must be immutable, since a pickle can also set attributes and states: a
        # storage class is its name, a function a bound method.
        if module in ("torch", "torch.storage") and name in STORAGES:
            return name
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        if (module, name) not in allowed:
            raise _Refused(f"{module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid) -> _Storage:
        kind, storage_type, key, _, size = pid
        if kind != "storage" or storage_type not in STORAGES:
            raise ValueError(f"it names a storage of an unknown kind: {pid!r}")
        dtype = STORAGES[storage_type]
        info = self.archive.getinfo(f"{self.prefix}data/{key}")
        _check_stored(info)
        if info.file_size != size * dtype.itemsize:
            raise ValueError(f"storage {key} has {info.file_size} bytes for {size} elements")
        self.stream.seek(info.header_offset)
        header = self.stream.read(ZIP_LOCAL_HEADER)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return _Storage(dtype, info.header_offset + ZIP_LOCAL_HEADER + names, size)

    def _tensor(self, storage, first, shape, strides, requires_grad, hooks, metadata=None):
        shape, strides = tuple(shape), tuple(strides)
        if any(not isinstance(i, int) or i < 0 for i in (first, *shape, *strides)):
            raise ValueError(f"a tensor has shape {shape}, strides {strides}, offset {first}")
        offset = storage.offset + first * storage.dtype.itemsize
        tensor = StoredTensor(self.file, storage.dtype, shape, strides, offset)
        if first + tensor.extent > storage.size:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
        return tensor

    def _parameter(self, tensor, requires_grad, hooks):
        return tensor


def _check_stored(info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its entry {info.filename} is compressed")
