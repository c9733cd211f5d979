"""What is different in the command line's own process, so that it starts and ends sooner."""

import atexit
import gc
import os
import pathlib
import sys

COMMAND = "keras-mamba2"  # what pyproject.toml calls it
RUN_PROGRAMS = "run-programs"  # what cli.py calls the one that needs no Keras
# Optional for Keras and KerasHub: data sets, plots, notebooks, checkpoints, and preprocessing in
# graphs.
UNUSED = ("tensorflow", "tensorflow_text", "pandas", "matplotlib", "IPython", "orbax")


def leave_out_unused() -> None:
    """On JAX, as if some packages were not installed.

    Keras and KerasHub import them where they are, and do without where they are not. Nothing that
    `keras-mamba2` does uses them, and they take more than half of the time of its imports.
    """
    if _is_command() and os.environ.get("KERAS_BACKEND") == "jax":
        for name in UNUSED:
            # An import of it then fails, as if it was not there.
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def leaves_out_keras() -> bool:
    """Whether exported programs are all that is asked for."""
    return _is_command() and sys.argv[1:2] == [RUN_PROGRAMS]


def pause_garbage_collection() -> None:
    """Until `resume_garbage_collection`, and when the process ends.

    What is imported stays, but is searched again and again: a sixth of the imports' time, and half
    a second at the end.
    """
    if _is_command() and gc.isenabled():
        gc.disable()
        atexit.register(gc.freeze)


def resume_garbage_collection() -> None:
    if _is_command():
        gc.freeze()  # else the first search comes at once, for as long as those left out
        gc.enable()


def _is_command() -> bool:
    return pathlib.Path(sys.argv[0]).stem == COMMAND
