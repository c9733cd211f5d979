"""Private parts of `fit`, `evaluate`, optimizers and callbacks."""

import contextlib
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import keras


def batches_trained(optimizer: keras.optimizers.Optimizer) -> int:
    """How many batches `optimizer` has seen; with loss scaling, but for those that overflowed.

    `_iterations`, since `iterations` counts those on which gradients were applied, fewer with
    `gradient_accumulation_steps`. A `LossScaleOptimizer` counts in the optimizer that it wraps
    alone, and not what it leaves out. Written for Keras 3.15.
    """
    return int(getattr(optimizer, "inner_optimizer", optimizer)._iterations)


def evaluates_within_fit(arguments: Mapping[str, Any]) -> bool:
    """Whether `fit` calls `evaluate`, with these keyword arguments, on its `validation_data`.

    `_use_cached_eval_dataset`, since `evaluate` is told nowhere else. Written for Keras 3.15.
    """
    return bool(arguments.get("_use_cached_eval_dataset"))


def backup_paths(callback: keras.callbacks.BackupAndRestore) -> tuple[str, str]:
    """The files that `callback` writes: the weights, and how far training is.

    `_weights_path` and `_training_metadata_path`, since only `backup_dir` is public. Written for
    Keras 3.15.
    """
    return callback._weights_path, callback._training_metadata_path


def begin_at_initial_epoch(model: keras.Model) -> None:
    """Lets the next `fit` begin at its `initial_epoch`, also after one that was restored.

    `_initial_epoch`, which a restored backup sets, and which stays. Written for Keras 3.15.
    """
    model._initial_epoch = None


@contextlib.contextmanager
def backup_at(
    callback: keras.callbacks.BackupAndRestore, weights: str, metadata: str
) -> Iterator[None]:
    """Makes `callback` write and read two other files than `backup_paths`, while inside.

    `_weights_path` and `_training_metadata_path`. Written for Keras 3.15.
    """
    before = backup_paths(callback)
    callback._weights_path, callback._training_metadata_path = weights, metadata
    try:
        yield
    finally:
        callback._weights_path, callback._training_metadata_path = before
