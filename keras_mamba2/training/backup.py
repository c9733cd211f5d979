import keras

from keras_mamba2._compat.keras_training import backup_paths
from keras_mamba2._compat.keras_training import backup_written_to
from keras_mamba2.atomic_files import atomic_file


class SharedBackupAndRestore(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` where several processes train one model.

    The first process writes the backup, which is whole or the one before, and all restore it,
    from one folder that all can read.
    When a process dies the others stop with an error of JAX's; started again, all together, they
    go on after the last backup.

    Args:
        backup_dir: path of the folder.
        **kwargs: see `keras.callbacks.BackupAndRestore`.
    """

    def _save_model(self):
        if keras.config.backend() == "jax":
            self.model.jax_state_sync()  # puts arrays on the devices of all processes
        if not _is_first_process():
            return
        # Keras makes an optimizer while it saves: not on devices where the others make none.
        distribution = keras.distribution.distribution()
        keras.distribution.set_distribution(None)
        paths = backup_paths(self)
        try:
            # When another process dies JAX ends this one, maybe while it writes.
            with atomic_file(paths[0]) as weights, atomic_file(paths[1]) as metadata:
                with backup_written_to(self, str(weights), str(metadata)):
                    super()._save_model()
        finally:
            keras.distribution.set_distribution(distribution)

    def on_train_end(self, logs=None):
        if _is_first_process():
            super().on_train_end(logs)


def _is_first_process() -> bool:
    if keras.config.backend() != "jax":
        return True
    import jax

    return jax.process_index() == 0
