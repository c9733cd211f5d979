"""The dtypes in which the layers of a model keep what they remember: `Sublayer.kept_dtypes`."""

from collections.abc import Iterator

from keras_mamba2._compat.keras_layers import flatten_layers
from keras_mamba2.layers.attention import KEY_VALUE_DTYPE
from keras_mamba2.layers.mamba2_mixer import STATE_DTYPE
from keras_mamba2.layers.sublayer import Sublayer

KEPT_DTYPES = {"state_dtype": STATE_DTYPE, "key_value_dtype": KEY_VALUE_DTYPE}


def kept_dtype(model, name: str) -> str | None:
    """The dtype called `name` in all layers of `model`; None where they differ, and without one.

    What layers that differ have stands in their own arguments.
    """
    dtypes = {getattr(layer, name) for layer in _layers(model, name)}
    return dtypes.pop() if len(dtypes) == 1 else None


def set_kept_dtypes(model, **dtypes: str | None) -> None:
    """Sets those that are not None in all layers. States made before do not fit after.

    Raises:
        ValueError: for a dtype that is not supported, and where no layer has it.
    """
    for name, dtype in dtypes.items():
        if KEPT_DTYPES[name](name, dtype) is None:
            continue
        layers = list(_layers(model, name))
        if not layers:
            raise ValueError(f"No layer of the model has a `{name}`. Received: {name}={dtype!r}")
        for layer in layers:
            setattr(layer, name, dtype)


def _layers(model, name: str) -> Iterator[Sublayer]:
    for layer in flatten_layers(model):
        if isinstance(layer, Sublayer) and name in layer.kept_dtypes:
            yield layer
