"""Private parts of saving."""

from keras.src.utils import io_utils


def ask_to_overwrite(path) -> bool:
    """Asks the user whether `path` may be overwritten, as `keras.Model.save` does.

    `keras.src.utils.io_utils.ask_to_proceed_with_overwrite`, since it has no public name.
    Written for Keras 3.15.
    """
    return io_utils.ask_to_proceed_with_overwrite(path)
