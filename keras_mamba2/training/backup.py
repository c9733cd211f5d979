import pathlib
import re
import warnings

import keras

from keras_mamba2._compat.keras_training import backup_at
from keras_mamba2._compat.keras_training import backup_paths
from keras_mamba2._compat.keras_training import begin_at_initial_epoch
from keras_mamba2.atomic_files import atomic_folder
from keras_mamba2.atomic_files import clean_up_in
from keras_mamba2.atomic_files import remove_folder
from keras_mamba2.devices import undistributed
from keras_mamba2.training import adapter_values


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` that survives a kill, for one process or several.

    Keras writes over its only backup, so that a process that is killed while it writes leaves
    one that cannot be restored. Here each backup is a new folder in `backup_dir`, named by a
    number. It appears by one renaming when weights and epoch are written, and only then the one
    before is removed. So a process may be killed at any moment, and the disk may be full: the
    last complete backup is restored. A power failure is not covered, since nothing waits until
    the disk has written.

    LoRA adapters are kept too, beside the weights that they adapt: Keras writes these merged, and
    begins with new adapters. Enable LoRA as before, and then restore.

    If several processes train one model, the first one writes and all restore, from one folder
    that all can read. So each process must have all of the weights: cut between processes, they
    are for `keras.callbacks.OrbaxCheckpoint`. When one process dies, the others stop with an error
    from JAX. Start all of them again: they go on from the last backup.

    Args:
        backup_dir: path of a local folder, for this training alone. A backup of Keras' callback
            in it is restored too.
        **kwargs: see `keras.callbacks.BackupAndRestore`. With `double_checkpoint` the last two
            backups are kept, and the older one is restored if the newer cannot be read.

    Example:
    ```python
    backup = keras_mamba2.training.BackupAndRestore("backup")
    lm.fit(texts, epochs=10, callbacks=[keras_mamba2.training.SeedByEpoch(), backup])
    ```
    """

    def on_train_begin(self, logs=None):
        """As there.

        Raises:
            ValueError: for weights that are cut between processes, and a backup of a model with
                other adapters.
        """
        _check_whole(self.model)
        begin_at_initial_epoch(self.model)  # whatever a `fit` that was restored, and failed, left
        backups = self._backups()
        while backups:
            folder = backups.pop()
            try:
                adapter_values.check(self.model, folder)
                with backup_at(self, *self._files(folder)):
                    super().on_train_begin(logs)
                return adapter_values.assign(self.model, folder)
            except (OSError, ValueError):  # damaged: the one before it may be whole
                if not backups:
                    raise
        if pathlib.Path(backup_paths(self)[0]).exists():  # of Keras' own callback
            adapter_values.check(self.model, pathlib.Path(self.backup_dir))
        return super().on_train_begin(logs)

    def _save_model(self):
        if keras.config.backend() == "jax":
            self.model.jax_state_sync()  # puts arrays on the devices of all processes
        if not _is_first_process():
            return
        clean_up_in(self.backup_dir)
        backups = self._backups()
        number = int(backups[-1].name) + 1 if backups else 1
        # Keras makes an optimizer while it saves: not on devices that all processes share.
        with undistributed():
            with atomic_folder(pathlib.Path(self.backup_dir) / f"{number:08}") as folder:
                with backup_at(self, *self._files(folder)):
                    super()._save_model()
                adapter_values.write(self.model, folder)
        for backup in backups[: -1 if self.double_checkpoint else None]:
            remove_folder(backup)

    def on_train_end(self, logs=None):
        begin_at_initial_epoch(self.model)
        if not _is_first_process():
            return
        if self.delete_checkpoint:
            for backup in self._backups():  # the oldest first: what is left is the last one
                remove_folder(backup)
        super().on_train_end(logs)

    def _backups(self) -> list[pathlib.Path]:
        """The complete backups, the oldest first."""
        folder = pathlib.Path(self.backup_dir)
        paths = folder.iterdir() if folder.is_dir() else []
        backups = [path for path in paths if re.fullmatch(r"\d{8,}", path.name)]
        return sorted(backups, key=lambda path: int(path.name))

    def _files(self, folder: pathlib.Path) -> list[str]:
        return [str(folder / pathlib.Path(path).name) for path in backup_paths(self)]


class SharedBackupAndRestore(BackupAndRestore):
    """The former name of `BackupAndRestore`, which is for one process and for several."""

    def __init__(self, *args, **kwargs):
        warnings.warn(
            "`SharedBackupAndRestore` is now `keras_mamba2.training.BackupAndRestore`; the former "
            "name goes away with the next minor version.",
            DeprecationWarning,
            stacklevel=2,
        )
        super().__init__(*args, **kwargs)


def _check_whole(model: keras.Model) -> None:
    """Raises unless this process has all of each variable: the first one writes them."""
    if keras.config.backend() != "jax":
        return
    for variable in model.variables:
        value = variable.value
        if not (value.is_fully_addressable or value.is_fully_replicated):
            raise ValueError(
                f"{variable.path!r} is cut between processes, and a backup is written by one that "
                "has all of it. Cut weights between the devices of one process, or use "
                "`keras.callbacks.OrbaxCheckpoint`."
            )


def _is_first_process() -> bool:
    if keras.config.backend() != "jax":
        return True
    import jax

    return jax.process_index() == 0
