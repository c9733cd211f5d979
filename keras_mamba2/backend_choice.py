"""JAX, where nothing else was chosen. Runs before Keras is imported, which then has its backend."""

import json
import logging
import os
import pathlib
import sys

logger = logging.getLogger("keras_mamba2")

# Keras writes this file when it is first imported, so by itself it is nobody's choice.
KERAS_DEFAULTS = {
    "floatx": "float32",
    "epsilon": 1e-7,
    "backend": "tensorflow",
    "image_data_format": "channels_last",
}


def choose_backend() -> None:
    """Sets `KERAS_BACKEND` to JAX unless it is set, `keras.json` names another, or Keras runs.

    A `keras.json` with Keras' own defaults, which name TensorFlow, is as good as none: to run on
    TensorFlow set `KERAS_BACKEND=tensorflow`.
    """
    if "keras" in sys.modules or os.environ.get("KERAS_BACKEND") or _chosen_in_file():
        return
    os.environ["KERAS_BACKEND"] = "jax"


def _chosen_in_file() -> bool:
    folder = os.environ.get("KERAS_HOME") or pathlib.Path.home() / ".keras"
    try:
        config = json.loads((pathlib.Path(folder) / "keras.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "backend" in config and config != KERAS_DEFAULTS


def report_other_backend() -> None:
    """Says in one line what is slower where the backend is not JAX."""
    import keras

    backend = keras.config.backend()
    if backend != "jax":
        logger.warning(
            "keras_mamba2 runs on %s, where training and generation are slower than on JAX, and "
            "no TPU is used. To change it, set KERAS_BACKEND=jax before Keras is imported.",
            backend,
        )
