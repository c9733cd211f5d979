"""Small training runs, for `test_fit.py` and for a process of its own that is killed in one.

Run as `python -m tests.training.runs FOLDER`, where TensorFlow cannot be imported. Prints losses.
"""

import json
import os
import pathlib
import signal
import sys

if __name__ == "__main__":
    sys.modules["tensorflow"] = None  # an import of it fails, as where it is not installed

import grain
import keras
import numpy as np

import keras_mamba2
from keras_mamba2.models.mamba2_tokenizer import byte_vocabulary

TEXTS = ["hello", "hi you", "a, b, c", "the quick brown fox jumps", "it was late", "to be"]
BATCH_SIZE, STEPS_PER_EPOCH, EPOCHS = 2, 3, 3


def make_lm(optimizer="adam", **kwargs) -> keras_mamba2.Mamba2CausalLM:
    keras.utils.set_random_seed(0)
    tokenizer = keras_mamba2.Mamba2Tokenizer(byte_vocabulary("<|endoftext|>"), [])
    lm = keras_mamba2.Mamba2CausalLM(
        keras_mamba2.Mamba2Backbone(257, 1, 8, state_dim=2, head_dim=4, chunk_size=8, **kwargs),
        keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, sequence_length=8),
    )
    lm.compile(optimizer=optimizer, weighted_metrics=[])
    lm.optimizer.build(lm.trainable_variables)
    return lm


def weights_of(lm) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(v) for v in lm.weights]


class Rows:
    """Preprocessed rows, each by its number, as a source for `grain`."""

    def __init__(self, *rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows[-1])

    def __getitem__(self, i):
        return keras.tree.map_structure(lambda array: np.asarray(array[i]), self.rows)


def inputs(preprocessor) -> dict:
    """The same texts in every form that `fit` takes without TensorFlow."""
    source, rows = grain.MapDataset.source, preprocessor(TEXTS)
    return {
        "list": TEXTS,
        "array": np.array(TEXTS),
        "objects": np.array(TEXTS, object),
        "grain map": source(TEXTS).batch(BATCH_SIZE),
        "grain iter": source(TEXTS).to_iter_dataset().batch(BATCH_SIZE),
        "rows": rows,
        "grain rows": source(Rows(*rows)).batch(BATCH_SIZE),
    }


def use(method, data, **kwargs):
    """`lm.fit`, or another method, with data of any form."""
    if isinstance(data, (list, np.ndarray, tuple)):
        kwargs["batch_size"] = BATCH_SIZE
    data = data if isinstance(data, tuple) else (data,)
    names = ("x", "y", "sample_weight")
    return method(**dict(zip(names, data, strict=False)), verbose=0, **kwargs)


def snapshot(lm) -> list[tuple]:
    """Weights and optimizer, for `put_back`."""
    variables = lm.trainable_variables + lm.optimizer.variables
    return [(variable, keras.ops.convert_to_numpy(variable)) for variable in variables]


def put_back(values: list[tuple]) -> None:
    for variable, value in values:
        variable.assign(value)


def trained(lm, data, **kwargs) -> tuple[list[float], list[np.ndarray]]:
    """The losses of two epochs, and the weights after them. `lm` is as before then."""
    before = snapshot(lm)
    callbacks = [keras_mamba2.training.SeedByEpoch()]
    losses = use(lm.fit, data, epochs=2, callbacks=callbacks, **kwargs).history["loss"]
    weights = weights_of(lm)
    put_back(before)
    return losses, weights


class KillIn(keras.callbacks.Callback):
    """Ends the process with no chance to clean up, in the middle of an epoch."""

    def __init__(self, epoch: int):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.is_last = epoch == self.epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.is_last and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def shuffled_run(lm, folder: pathlib.Path, *callbacks) -> list[np.ndarray]:
    """The weights after training on data in another order each epoch.

    It begins at the backup in `folder`, if there is one.
    """
    batches = grain.MapDataset.source(TEXTS).seed(7).shuffle().repeat(EPOCHS).batch(BATCH_SIZE)
    backup = keras_mamba2.training.BackupAndRestore(folder, double_checkpoint=True)
    done = keras_mamba2.training.restore(lm, backup)
    lm.fit(
        batches[done:],
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        callbacks=[keras_mamba2.training.SeedByEpoch(), backup, *callbacks],
        verbose=0,
    )
    return weights_of(lm)


if __name__ == "__main__":
    lm = make_lm(dropout=0.3)
    forms = inputs(lm.preprocessor)
    print(json.dumps({name: trained(lm, data)[0] for name, data in forms.items()}), flush=True)
    shuffled_run(lm, pathlib.Path(sys.argv[1]), KillIn(epoch=1))
