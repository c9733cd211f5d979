"""How a model in a `.keras` file was compiled.

Keras leaves this to classes that override `compile`, as KerasHub's do. Without it, a loaded model
has a new default optimizer instead of the one that it was trained with.
"""

import keras


def with_optimizer_built(config: dict, model: keras.Model) -> dict:
    """`config` of `get_compile_config`, and whether the optimizer's variables are in the file."""
    if not config:  # not compiled
        return config
    return {**config, "optimizer_built": getattr(model.optimizer, "built", False)}


def compile_from_config(model: keras.Model, config: dict) -> None:
    """The inverse: compiles `model`, and makes the optimizer's variables for their values."""
    config = dict(config)
    optimizer_built = config.pop("optimizer_built", False)
    model.compile(**keras.saving.deserialize_keras_object(config))
    if optimizer_built:
        model.optimizer.build(model.trainable_variables)
