"""A number for a text: the same however the text was read, in pieces or as a whole."""

import numpy as np
from keras import ops

# A polynomial in this odd number, modulo 2**32 by the overflow of int32.
BASE = np.array(0x01000193, "int32")


def powers(count: int) -> np.ndarray:
    """`BASE` to the powers 0 to `count`."""
    factors = np.full(count + 1, BASE)
    factors[0] = 1
    return np.cumprod(factors, dtype="int32")


def digest_after(digest, token_ids, mask=None):
    """The digest `(b)` of texts that go on with `token_ids` `(b t)`, where `mask` `(b t)` is true.

    Args:
        digest: int32 `(b)`, of the texts before; 0 for none.
        token_ids: int tensor `(b t)`.
        mask: optional boolean tensor `(b t)`.
    """
    t = token_ids.shape[1]
    real = ops.ones_like(token_ids) if mask is None else ops.cast(mask, "int32")
    through = ops.cumsum(real, axis=1)
    count = through[:, -1]
    table = ops.convert_to_tensor(powers(t))
    # Each token times BASE to the number of tokens after it. Plus 1, so that id 0 counts too.
    terms = real * (ops.cast(token_ids, "int32") + 1) * ops.take(table, count[:, None] - through)
    new = digest * ops.take(table, count) + ops.sum(terms, axis=1)
    return ops.cast(new, "int32")
