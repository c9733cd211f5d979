"""Whether numbers are finite."""

import ml_dtypes
import numpy as np

FLOATS = tuple(map(np.dtype, ("f8", "f4", "f2", ml_dtypes.bfloat16)))
BLOCK = 1 << 14  # numbers that stay in the cache of a processor


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers are finite: `np.isfinite(array).all()`, in less memory and time."""
    if array.dtype not in FLOATS:
        return True
    flat = np.ascontiguousarray(array).reshape(-1)
    if array.dtype.itemsize == 2:
        return all(map(_is_finite_16, np.split(flat, range(BLOCK, flat.size, BLOCK))))
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.dot(flat, flat)
    # What is not finite makes the sum so. So do numbers whose squares are too large.
    return bool(np.isfinite(squares) or np.isfinite(flat).all())


def _is_finite_16(flat: np.ndarray) -> bool:
    """For 16 bits, which processors do not compute with: NaN and infinity have the largest ones."""
    infinity = np.array(np.inf, flat.dtype).view("u2")
    return bool(((flat.view("u2") & 0x7FFF) < infinity).all())
