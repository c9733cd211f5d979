from collections.abc import Callable

import keras


class KeptWeights:
    """A model that has its weights when `fit`, `evaluate` or `predict` ends with an error.

    Keras on JAX takes the weights out of a model while a batch is read, and lets them go if that
    fails: in the first batch of an epoch of `fit`, and in any of `evaluate` and `predict`. A
    batch that is refused would cost the model. This class stands before Keras' in the bases.
    """

    jax_state_sync: Callable[[], None]

    def _get_jax_state(self, **kwargs):
        state = super()._get_jax_state(**kwargs)
        if kwargs.get("purge_model_variables"):
            # What `jax_state_sync` puts back, which `fit` calls in the end.
            names = [name for name, is_asked in kwargs.items() if is_asked]
            names.remove("purge_model_variables")
            self._jax_state = dict(zip(names, state, strict=True))
        return state

    def evaluate(self, *args, **kwargs):
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._put_back()

    def predict(self, *args, **kwargs):
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._put_back()

    def _put_back(self) -> None:
        if keras.config.backend() == "jax":
            self.jax_state_sync()  # nothing, if all is there
