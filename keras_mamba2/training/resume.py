import keras
import numpy as np

from keras_mamba2._compat.keras_training import batches_trained
from keras_mamba2.arguments import integer


class SeedByEpoch(keras.callbacks.Callback):
    """Makes the random numbers of an epoch, such as dropout's, depend on its number alone.

    `keras_mamba2.training.BackupAndRestore` keeps weights and optimizer, but no random numbers.
    With this beside it, a run that was killed in an epoch and started again repeats that epoch,
    and ends with the weights of a run that was not killed.

    Args:
        seed: int.

    Example:
    ```python
    backup = keras_mamba2.training.BackupAndRestore("backup")
    lm.fit(texts, epochs=10, callbacks=[keras_mamba2.training.SeedByEpoch(), backup])
    ```
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = integer(at_least=0)("seed", seed)

    def on_epoch_begin(self, epoch, logs=None):
        seeds = [v for v in self.model.non_trainable_variables if v.name == "seed_generator_state"]
        for i, state in enumerate(seeds):
            state.assign(np.random.SeedSequence([self.seed, epoch, i]).generate_state(2))


def restore(model: keras.Model, backup: keras.callbacks.BackupAndRestore) -> int:
    """Restores a compiled model now, before `fit` begins.

    For data whose order changes from epoch to epoch. `fit` reads data from its start, so after a
    restart the data must start where the backup was made.

    Args:
        model: a `keras.Model` after `compile`.
        backup: the callback that is also passed to `fit`: `keras_mamba2.training.BackupAndRestore`,
            or that of Keras, whose backup a kill can damage.

    Returns:
        The number of batches that were trained on before the backup; 0 if there is none. In
        mixed_float16, batches whose gradients overflowed were not trained on.

    Example:
    ```python
    # Texts, or the rows of a preprocessor that packs: of texts `fit` would pack others.
    batches = grain.MapDataset.source(texts).seed(0).shuffle().repeat(3).batch(8)
    steps = min(100, len(batches))  # and then a backup
    backup = keras_mamba2.training.BackupAndRestore("backup")
    done = keras_mamba2.training.restore(lm, backup)
    if done < len(batches):
        lm.fit(
            batches[done:],
            steps_per_epoch=steps,
            epochs=len(batches) // steps,
            callbacks=[keras_mamba2.training.SeedByEpoch(), backup],
        )
    else:  # it was killed when all was done, but for the removal of its backup
        backup.on_train_end()
    ```
    """
    backup.set_model(model)
    backup.on_train_begin()
    return batches_trained(model.optimizer)
