"""How a model in a `.keras` file was compiled.

Keras leaves this to classes that override `compile`, as KerasHub's do. Without it, a loaded model
has a new default optimizer instead of the one that it was trained with, and another sampler.
"""

from typing import Any

import keras

# In the optimizer's own part, where Keras does not look for it: a clone of a task is a plain model,
# whose `compile` takes nothing that Keras does not know.
OURS = "keras_mamba2"


def compile_config(config: dict, model: keras.Model, **ours: Any) -> dict:
    """`config` of `get_compile_config` with what Keras leaves out.

    That is whether the optimizer's variables are in the file, and `ours`, arguments of `compile`.
    """
    if not config or model.optimizer is None:  # not compiled, or for no training
        return config
    optimizer = keras.optimizers.serialize(model.optimizer)
    ours = {"built": model.optimizer.built, **ours}
    return {**config, "optimizer": {**optimizer, OURS: keras.saving.serialize_keras_object(ours)}}


def compile_from_config(model: keras.Model, config: dict) -> None:
    """The inverse: compiles `model`, and makes the optimizer's variables for their values."""
    optimizer = config.get("optimizer")
    ours = optimizer.get(OURS, {}) if isinstance(optimizer, dict) else {}
    ours = keras.saving.deserialize_keras_object(ours)
    built = ours.pop("built", False)
    model.compile(**keras.saving.deserialize_keras_object(config), **ours)
    if built:
        model.optimizer.build(model.trainable_variables)
