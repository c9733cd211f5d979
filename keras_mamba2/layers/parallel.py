from collections.abc import Mapping
from collections.abc import Sequence

import keras

from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import instance
from keras_mamba2.arguments import number
from keras_mamba2.arguments import several
from keras_mamba2.layers.experts_projection import AnyProjection
from keras_mamba2.layers.sublayer import Sublayer

SUBLAYERS = several(instance(Sublayer))


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Parallel(Sublayer):
    """The sum of sublayers that have the same input, each scaled before and after.

    Args:
        sublayers: sequence of `keras_mamba2.layers.Sublayer`, with names that differ.
        input_multipliers: sequence of floats, one for each. `None` for ones.
        output_multipliers: sequence of floats, one for each. `None` for ones.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: tensor `(b t d)`.
        mask: optional boolean tensor `(b t)`, as the sublayers take it.
        segment_ids: optional int tensor `(b t)`, as the sublayers take it.
    """

    def __init__(
        self,
        sublayers: Sequence[Sublayer],
        input_multipliers: Sequence[float] | None = None,
        output_multipliers: Sequence[float] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.sublayers = list(SUBLAYERS("sublayers", sublayers))
        names = [sublayer.name for sublayer in self.sublayers]
        if len(set(names)) < len(names):
            raise ValueError(
                "Sublayers side by side need names that differ, or their weights have the same "
                f"paths. Received: {', '.join(map(repr, names))}"
            )
        ones = (1.0,) * len(self.sublayers)
        self.input_multipliers = ones if input_multipliers is None else input_multipliers
        self.output_multipliers = ones if output_multipliers is None else output_multipliers
        factors = several(number(), len(self.sublayers))
        check_attributes(self, input_multipliers=factors, output_multipliers=factors)

    def build(self, x_shape, mask_shape=None, segment_ids_shape=None):
        for sublayer in self.sublayers:
            if not sublayer.built:  # built: made from a configuration
                sublayer.build(x_shape)

    def call(self, x, mask=None, segment_ids=None):
        return self._sum(x, lambda i, x: self.sublayers[i](x, mask=mask, segment_ids=segment_ids))

    def call_with_state(self, x, state=None, mask=None, segment_ids=None):
        states = [None] * len(self.sublayers) if state is None else list(state)

        def output(i, x):
            y, states[i] = self.sublayers[i].call_with_state(x, states[i], mask, segment_ids)
            return y

        return self._sum(x, output), tuple(states)

    def step(self, x, state, mask=None):
        states = list(state)

        def output(i, x):
            y, states[i] = self.sublayers[i].step(x, states[i], mask)
            return y

        return self._sum(x, output), tuple(states)

    def extend(self, x, state, chunk, start):
        chunks = list(chunk)

        def output(i, x):
            y, chunks[i] = self.sublayers[i].extend(x, state[i], chunks[i], start)
            return y

        return self._sum(x, output), tuple(chunks)

    def commit(self, state, chunk, count):
        parts = zip(self.sublayers, state, chunk, strict=True)
        return tuple(layer.commit(state, chunk, count) for layer, state, chunk in parts)

    def chunk_spec(self, size: int):
        return tuple(sublayer.chunk_spec(size) for sublayer in self.sublayers)

    def _sum(self, x, output):
        total = None
        multipliers = zip(self.input_multipliers, self.output_multipliers, strict=True)
        for i, (before, after) in enumerate(multipliers):
            y = output(i, x if before == 1 else x * before)
            y = y if after == 1 else y * after
            total = y if total is None else total + y
        return total

    def state_spec(self, max_length: int | None = None):
        return tuple(sublayer.state_spec(max_length) for sublayer in self.sublayers)

    @property
    def projections(self) -> tuple[AnyProjection, ...]:
        return tuple(layer for sublayer in self.sublayers for layer in sublayer.projections)

    @property
    def weight_axes(self) -> Mapping[str, Mapping[str, int]]:
        return {
            f"{sublayer.name}/{path}": axes
            for sublayer in self.sublayers
            for path, axes in sublayer.weight_axes.items()
        }

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "sublayers": [keras.saving.serialize_keras_object(s) for s in self.sublayers],
                "input_multipliers": self.input_multipliers,
                "output_multipliers": self.output_multipliers,
            }
        )
        return config

    @classmethod
    def from_config(cls, config):
        sublayers = [keras.saving.deserialize_keras_object(s) for s in config["sublayers"]]
        return cls(**{**config, "sublayers": sublayers})
