"""Private parts of saving."""

from collections.abc import Iterable
from typing import Any

from keras.src.saving import saving_lib
from keras.src.utils import io_utils


def ask_to_overwrite(path) -> bool:
    """Asks the user whether `path` may be overwritten, as `keras.Model.save` does.

    `keras.src.utils.io_utils.ask_to_proceed_with_overwrite`, since it has no public name.
    Written for Keras 3.15.
    """
    return io_utils.ask_to_proceed_with_overwrite(path)


class _Recorder(saving_lib.H5IOStore):
    """Takes what layers save under their names, and writes nothing."""

    def __init__(self):
        self.tensors: dict[str, Any] = {}
        self._group = ""

    def __bool__(self):
        return True

    def make(self, path, metadata=None):
        self._group = f"{path}/vars" if path else "vars"
        return self

    def __setitem__(self, key, value):
        self.tensors[f"{self._group}/{key}"] = value


def saved_tensors(model, skipped: Iterable[Any] = ()) -> dict[str, Any]:
    """What `model.save_weights` would write, by its name in the file; variables need no values.

    `keras.src.saving.saving_lib._save_state`, since the names have no public source. Written for
    Keras 3.15.

    Args:
        model: the model.
        skipped: layers that are left out.
    """
    recorder = _Recorder()
    saving_lib._save_state(model, recorder, None, "", {id(layer) for layer in skipped})
    return recorder.tensors
