import keras


def compile_from_config(model: keras.Model, config: dict) -> None:
    """Compiles a model that is loaded from a `.keras` file as it was when it was saved.

    Keras leaves this to classes that override `compile`, which KerasHub's do; without it, a loaded
    model has the default optimizer, and nothing of the one that it was trained with.
    """
    model.compile(**keras.saving.deserialize_keras_object(config))
    model.optimizer.build(model.trainable_variables)
