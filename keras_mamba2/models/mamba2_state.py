import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mamba2.layers.mamba2_mixer import MixerState


class Mamba2State:
    """What a Mamba-2 model remembers of the tokens before, of one size whatever their number.

    A pytree with batch-first leaves, so it can be passed through `jax.jit`, gathered by rows in
    beam search and donated.

    Args:
        layers: sequence of `MixerState`, one a layer: conv `(b k-1 e+2gn)`, ssm `(b h p n)`.
    """

    def __init__(self, layers: Sequence[MixerState]):
        self.layers = tuple(layers)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return self.layers, None

    @classmethod
    def tree_unflatten(cls, metadata: None, layers: Sequence[MixerState]) -> "Mamba2State":
        return cls(layers)

    # On the torch backend `keras.tree` wants them under these names, in this order.
    def torchtree_flatten(self) -> tuple[list[Any], None]:
        return list(self.layers), None

    @classmethod
    def torchtree_unflatten(cls, layers: Sequence[MixerState], metadata: None) -> "Mamba2State":
        return cls(layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together."""
        return sum(
            math.prod(leaf.shape) * np.dtype(keras.backend.standardize_dtype(leaf.dtype)).itemsize
            for layer in self.layers
            for leaf in layer
        )

    def __repr__(self) -> str:
        conv, ssm = self.layers[0]
        return (
            f"Mamba2State({len(self.layers)} layers, batch size {ssm.shape[0]}, "
            f"conv {tuple(conv.shape)}, ssm {tuple(ssm.shape)})"
        )


def _register_as_pytree() -> None:
    # The registry behind `keras.tree`, which differs by backend; Keras has no public name for it.
    from keras.src.tree.tree_api import register_tree_node_class

    register_tree_node_class(Mamba2State)
    if keras.config.backend() == "jax":
        import jax

        jax.tree_util.register_pytree_node_class(Mamba2State)


_register_as_pytree()
