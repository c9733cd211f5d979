"""What `fit`, `evaluate` and `predict` refuse: token ids and labels out of range.

Keras on JAX accepts them: an id outside the vocabulary makes the loss NaN, or is counted from the
end, and a label out of range adds nothing to the loss.
"""

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_mamba2._compat.keras_hub_preprocessing import in_tf_function


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
    wrong = np.argwhere(~np.isin(padding_mask, (0, 1)))
    if len(wrong):
        raise ValueError(
            "A `padding_mask` is 1 at real tokens and 0 elsewhere; numbers of documents that share "
            f"a row are `segment_ids`. Received: {padding_mask[tuple(wrong[0])]} in row "
            f"{wrong[0][0]}"
        )
    begins = np.diff(padding_mask.astype("int8"), axis=-1, prepend=0) > 0
    holes = np.flatnonzero(begins.sum(axis=-1) > 1)
    if len(holes):
        raise ValueError(
            f"The real tokens of a row must follow one another. Row {holes[0]} of `padding_mask` "
            "has padding between them."
        )


def check_rows(padding_mask: np.ndarray) -> None:
    check_mask(padding_mask)
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
    """Refuses class numbers out of range, where they have a weight. One-hot labels are not checked.

    `name` is that of the number of classes, for the message.
    """
    if not _takes_class_numbers(loss):
        return
    if labels.dtype.kind not in "biuf":
        raise ValueError(
            f"Labels must be class numbers, below {name}={num_classes}. "
            f"Received: labels of dtype {labels.dtype}"
        )
    if weights is not None:
        labels = np.where(weights != 0, labels, 0)
    _check_range(labels, num_classes, "Labels", name, getattr(loss, "ignore_class", None))


def _takes_class_numbers(loss) -> bool:
    return isinstance(loss, keras.losses.SparseCategoricalCrossentropy) or (
        loss == "sparse_categorical_crossentropy"
    )


def check_weights(weights: np.ndarray) -> None:
    """Refuses negative numbers, infinity and NaN."""
    wrong = np.argwhere(~((weights >= 0) & (weights < np.inf)))
    if len(wrong):
        raise ValueError(
            "`sample_weight` must be finite and not negative. "
            f"Received: {weights[tuple(wrong[0])]} in row {wrong[0][0]}"
        )


def check_if_known(check: Callable[..., None], array, *args) -> None:
    """Calls `check` with an array, unless a program is being traced, which has no values yet."""
    try:
        array = ops.convert_to_numpy(array)
    except Exception:  # each backend raises its own
        return
    check(array, *args)


def _check_range(values: np.ndarray, size: int, what: str, name: str, allowed=None) -> None:
    # Written so that NaN is refused: comparisons with it are false.
    is_valid = (values >= 0) & (values < size) & (values == np.floor(values))
    wrong = np.argwhere(~(is_valid | (values == allowed)))
    if len(wrong):
        raise ValueError(
            f"{what} must be whole numbers between 0 and {size - 1}, since {name}={size}. "
            f"Received: {values[tuple(wrong[0])]} in row {wrong[0][0]}"
        )
