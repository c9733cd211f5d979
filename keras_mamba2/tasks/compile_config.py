"""How a model in a `.keras` file was compiled.

Keras leaves this to classes that override `compile`, as KerasHub's do. Without it, a loaded model
has a new default optimizer instead of the one that it was trained with, and another sampler.
"""

import warnings
from typing import Any

import keras

# In the optimizer's own part, where Keras does not look for it: a clone of a task is a plain model,
# whose `compile` takes nothing that Keras does not know.
OURS = "keras_mamba2"


def compile_config(config: dict, model: keras.Model, sampler: Any = None) -> dict:
    """`config` of `get_compile_config` with what Keras leaves out.

    That is whether the optimizer's variables are in the file, and the sampler, if there is one. A
    model without an optimizer keeps neither.
    """
    if not config or model.optimizer is None:
        return config
    serialize = keras.saving.serialize_keras_object
    ours = {"built": model.optimizer.built, "sampler": serialize(sampler)}
    return {**config, "optimizer": {**keras.optimizers.serialize(model.optimizer), OURS: ours}}


def compile_from_config(model: keras.Model, config: dict) -> None:
    """The inverse: compiles `model`, and makes the optimizer's variables for their values."""
    optimizer = config.get("optimizer")
    ours = optimizer.get(OURS, {}) if isinstance(optimizer, dict) else {}
    sampler = _sampler(ours.get("sampler"))
    arguments = {} if sampler is None else {"sampler": sampler}
    model.compile(**keras.saving.deserialize_keras_object(config), **arguments)
    if ours.get("built"):
        model.optimizer.build(model.trainable_variables)


def _sampler(config: dict | None) -> Any:
    """The sampler, or `None` for one that is not known here: it is no reason to lose the model."""
    try:
        return keras.saving.deserialize_keras_object(config)
    except (TypeError, ValueError) as error:
        warnings.warn(
            f"The model's sampler could not be restored, compile it with one: {error}", stacklevel=2
        )
        return None
