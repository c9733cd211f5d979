"""What `fit`, `evaluate` and `predict` refuse: token ids and labels out of range.

Keras on JAX accepts them: an id outside the vocabulary makes the loss NaN, or is counted from the
end, and a label out of range adds nothing to the loss.
"""

from collections.abc import Callable
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_mamba2._compat.keras_hub_preprocessing import in_tf_function
from keras_mamba2.arguments import are_ids
from keras_mamba2.arguments import check_elements
from keras_mamba2.arguments import check_numeric
from keras_mamba2.arguments import shown


def real_positions(padding_mask):
    """Booleans, true where the mask is not zero; in a `tf.data` pipeline too."""
    if in_tf_function():
        import tensorflow as tf

        return tf.cast(padding_mask, "bool")
    return ops.convert_to_numpy(padding_mask) != 0


def check_batch(check: Callable[..., None], *arrays) -> None:
    """Calls `check` with the arrays: now, or whenever a `tf.data` pipeline makes such a batch.

    Arrays that are `None`, at the end, are left out.
    """
    arrays = [array for array in arrays if array is not None]
    if in_tf_function():
        import tensorflow as tf

        # Stateful, so that it runs although nothing uses its result.
        tf.numpy_function(check, arrays, [], stateful=True)
    else:
        check(*map(ops.convert_to_numpy, arrays))


def check_mask(padding_mask: np.ndarray) -> None:
    """Refuses anything but 0 and 1, and padding between real tokens."""
    check_elements(
        padding_mask,
        np.isin(padding_mask, (0, 1)),
        "A `padding_mask` is 1 at real tokens and 0 elsewhere; numbers of documents that share a "
        "row are `segment_ids`.",
    )
    begins = np.diff(padding_mask.astype("int8"), axis=-1, prepend=0) > 0
    holes = np.flatnonzero(begins.sum(axis=-1) > 1)
    if len(holes):
        raise ValueError(
            f"The real tokens of a row must follow one another. Row {holes[0]} of `padding_mask` "
            "has padding between them."
        )


def check_inputs(token_ids: np.ndarray, padding_mask: np.ndarray, vocabulary_size: int) -> None:
    """Refuses arrays of other shapes than `(b t)`, ids that are no tokens, and wrong masks."""
    if token_ids.ndim != 2 or token_ids.shape != padding_mask.shape:
        raise ValueError(
            "Token ids and mask must have one shape, (b t). Received: "
            f"token_ids.shape={token_ids.shape}, padding_mask.shape={padding_mask.shape}"
        )
    check_mask(padding_mask)
    check_token_ids(token_ids, vocabulary_size)


def check_rows(padding_mask: np.ndarray) -> None:
    empty = np.flatnonzero(~(padding_mask != 0).any(axis=-1))
    if len(empty):
        raise ValueError(
            f"Row {empty[0]} has no tokens: its `padding_mask` is all zero. Leave out empty texts, "
            "or let the preprocessor end every text with the end token (`add_end_token=True`)."
        )


def check_token_ids(token_ids: np.ndarray, vocabulary_size: int) -> None:
    _check_range(token_ids, vocabulary_size, "Token ids", "vocabulary_size")


def check_targets(target_ids: np.ndarray, num_tokens: int) -> None:
    _check_range(target_ids, num_tokens, "Targets", "num_tokens")


def check_labels(
    labels: np.ndarray,
    loss,
    num_classes: int,
    name: str = "num_classes",
    weights: np.ndarray | None = None,
) -> None:
    """Refuses class numbers out of range, where they have a weight.

    For other losses, as of one-hot labels, any finite numbers are labels. `name` is that of the
    number of classes, for the message.
    """
    loss = _resolved(loss)
    if not isinstance(loss, keras.losses.SparseCategoricalCrossentropy) and (
        loss is not keras.losses.sparse_categorical_crossentropy
    ):
        check_numeric("Labels", labels)
        check_elements(labels, np.isfinite(labels), "Labels must be finite.")
        return
    check_numeric("Labels", labels)
    if weights is not None:
        more = labels.ndim - weights.ndim  # of labels (b 1) beside weights (b), or the other way
        weights = np.reshape(weights, weights.shape[: labels.ndim] + (1,) * more)
        labels = np.where(weights != 0, labels, 0)
    _check_range(labels, num_classes, "Labels", name, getattr(loss, "ignore_class", None))


def _resolved(loss):
    """A loss as `compile` may name it, as a function or an object."""
    while isinstance(loss, (list, tuple)) and len(loss) == 1:
        [loss] = loss
    return keras.losses.get(loss) if isinstance(loss, (str, type)) else loss


def check_weights(weights: np.ndarray) -> None:
    """Refuses negative numbers, infinity and NaN."""
    check_numeric("`sample_weight`", weights)
    check_elements(
        weights,
        (weights >= 0) & (weights < np.inf),
        "`sample_weight` must be finite and not negative.",
    )


def check_texts_alone(y, sample_weight) -> None:
    """Refuses targets and weights beside texts, which the preprocessor would leave out."""
    given = {"y": y, "sample_weight": sample_weight}
    if received := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            "Texts are their own targets, and go without `y` and `sample_weight`. To set these, "
            "pass the rows that `preprocessor(texts)` gives, `x`, `y` and `sample_weight`. "
            f"Received: {' and '.join(received)} beside texts"
        )


def parts_of(x) -> tuple:
    """The arrays of a dict, or the segments of a tuple; anything else is one part."""
    return tuple(x.values()) if isinstance(x, Mapping) else x if isinstance(x, tuple) else (x,)


def check_samples(x) -> None:
    """Refuses what is no list or array of samples, or has none."""
    if isinstance(x, keras.utils.PyDataset):  # whose batches would all be read
        raise ValueError(
            "Data are a list, arrays, or a dataset of `tf.data` or `grain`; windows of one long "
            f"text are for `keras_mamba2.training.StatefulTraining`. Received: {type(x).__name__}"
        )
    for part in parts_of(x) or (x,):
        if not hasattr(part, "__len__") or isinstance(part, (str, bytes)) or not np.shape(part):
            raise ValueError(f"Samples must be a list or an array. Received: x={shown(x)}")
        if not len(part):
            raise ValueError(f"There is no sample in the data. Received: x={shown(x)}")


def check_if_known(check: Callable[..., None], array, *args) -> None:
    """Calls `check` with an array, unless a program is being traced, which has no values yet."""
    try:
        array = ops.convert_to_numpy(array)
    except Exception:  # each backend raises its own
        return
    check(array, *args)


def _check_range(values: np.ndarray, size: int, what: str, name: str, allowed=None) -> None:
    check_numeric(what, values)
    check_elements(
        values,
        are_ids(values, size) | (values == allowed),
        f"{what} must be whole numbers between 0 and {size - 1}, since {name}={size}.",
    )
