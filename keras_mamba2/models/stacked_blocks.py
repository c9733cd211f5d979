"""The blocks of a backbone as one, which a program runs in a loop.

A compiler takes its time for every block: a program of 64 blocks in a row costs it 64 times what
one of a loop over them does. The loop reads the weights of a block from an array with those of all.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_mamba2._compat.keras_layers import flatten_layers
from keras_mamba2._compat.keras_variables import has_value
from keras_mamba2._compat.keras_variables import initialize
from keras_mamba2._compat.keras_variables import take_value
from keras_mamba2.conversion.deferred import deferred_initialization
from keras_mamba2.layers.residual_block import ResidualBlock

FOR_INFERENCE = (
    "The weights of this model's blocks are stacked, to generate with. To train, call, quantize, "
    "adapt, save, load or export it, make the model without `stacked=True` and `stack_blocks`."
)


class Stacked(NamedTuple):
    """What there is for each block, such as its state, with leaves `(num_layers ...)`."""

    parts: Any


class StackedBlocks:
    """Blocks that differ in their names and weights only. Their weights are moved here.

    Args:
        blocks: sequence of `keras_mamba2.layers.ResidualBlock`, built. Weights that have no values
            yet are moved by `move_weights`, when they have.

    Raises:
        ValueError: on another backend than JAX, in a distribution, and for blocks that differ.
    """

    def __init__(self, blocks: Sequence[ResidualBlock]):
        _check(blocks)
        self.num_layers = len(blocks)
        self._block = blocks[0]
        self._apart = list(zip(*(block.variables for block in blocks), strict=True))
        # Of each variable of the blocks, which of those here has its value, and where.
        self._places = {
            id(v): (k, i) for k, apart in enumerate(self._apart) for i, v in enumerate(apart)
        }
        with deferred_initialization():
            self.variables = [
                keras.Variable(
                    keras.initializers.Zeros(),
                    shape=(self.num_layers, *first.shape),
                    dtype=first.dtype,
                    trainable=False,
                    autocast=False,
                    name=f"stacked_{first.name}",
                )
                for first, *_ in self._apart
            ]
        self.move_weights()

    def move_weights(self) -> None:
        """Takes the values of the blocks' variables, if all have one."""
        if not all(has_value(v) for apart in self._apart for v in apart):
            return
        for variable, apart in zip(self.variables, self._apart, strict=True):
            initialize(variable, ops.stack([v.value for v in apart]))
            for v in apart:
                take_value(v, FOR_INFERENCE)

    def value_of(self, variable: keras.Variable) -> Any:
        """The value of a variable, which may be one of the blocks'."""
        if id(variable) not in self._places or has_value(variable):
            return variable.value
        k, i = self._places[id(variable)]
        return self.variables[k].value[i]

    def in_place_of_theirs(self, variables: Sequence[keras.Variable]) -> list[keras.Variable]:
        """`variables` of a model, without those of the blocks and with these."""
        return [v for v in variables if id(v) not in self._places] + self.variables

    def together(self, parts: Sequence[Any]) -> Stacked:
        """What there is for each block, stacked."""
        import jax

        if isinstance(parts[0], Stacked):
            return parts[0]
        return Stacked(jax.tree.map(lambda *leaves: ops.stack(leaves), *parts))

    def apart(self, stacked: Stacked) -> list[Any]:
        import jax

        return [jax.tree.map(lambda a, i=i: a[i], stacked.parts) for i in range(self.num_layers)]

    def through(self, run: Callable, x: Any, *parts: Sequence[Any]) -> tuple[Any, list[Any]]:
        """`run(block, x, *parts)` for one block after the other.

        Args:
            run: function that returns the next `x`, and what replaces the last of the parts.
            x: tensor, or None.
            *parts: for each block something, or one `Stacked`.

        Returns:
            Tuple of the last `x`, and of the last of the parts, replaced, in the form it had.
        """
        import jax
        from jax import lax

        weights = [ops.convert_to_tensor(variable) for variable in self.variables]
        *read, replaced = (self.together(part).parts for part in parts)

        def step(i, carry):
            def of_block(arrays):
                return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, False), arrays)

            x, replaced = carry
            before = of_block(replaced)
            if x is not None:
                # It is read for x too. Without the barrier a TPU reads it and replaces it in one
                # kernel, and has to copy the states of all blocks before.
                before = lax.optimization_barrier(before)
            mapping = list(zip(self._block.variables, of_block(weights), strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                x, after = run(self._block, x, *of_block(read), before)
            return x, jax.tree.map(
                lambda a, new: lax.dynamic_update_index_in_dim(a, new, i, 0), replaced, after
            )

        # The first block may widen x: the residual stream is float32 from there on.
        widened = jax.eval_shape(lambda: step(0, (x, replaced))[0])
        x = None if x is None else x.astype(widened.dtype)
        x, replaced = lax.fori_loop(0, self.num_layers, step, (x, replaced))
        together = Stacked(replaced)
        is_together = isinstance(parts[-1][0], Stacked)
        return x, [together] if is_together else self.apart(together)


def check_apart(backbone) -> None:
    """Raises if the weights of the blocks have been moved: they are not to be read or changed."""
    if backbone.stacked is not None and all(map(has_value, backbone.stacked.variables)):
        raise ValueError(FOR_INFERENCE)


class WeightsApart:
    """A model whose weights, in files and lists, are those of each block."""

    def set_weights(self, weights) -> None:
        check_apart(getattr(self, "backbone", self))
        super().set_weights(weights)  # type: ignore[misc]

    def save_weights(self, filepath, *args, **kwargs) -> None:
        check_apart(getattr(self, "backbone", self))
        super().save_weights(filepath, *args, **kwargs)  # type: ignore[misc]

    def load_weights(self, filepath, *args, **kwargs) -> None:
        check_apart(getattr(self, "backbone", self))
        super().load_weights(filepath, *args, **kwargs)  # type: ignore[misc]


def _check(blocks: Sequence[ResidualBlock]) -> None:
    if keras.config.backend() != "jax":
        raise ValueError(
            "Blocks are stacked on JAX only. Received: "
            f"keras.config.backend()={keras.config.backend()!r}"
        )
    if keras.distribution.distribution() is not None:
        raise ValueError("Blocks are not stacked in a distribution: leave its scope, or `stacked`.")
    first = _described(blocks[0])
    for block in blocks:
        if _described(block) != first:
            raise ValueError(
                "Only blocks that are all alike can be stacked. "
                f"Received: {blocks[0].name} and {block.name}, which differ"
            )


def _described(block: ResidualBlock) -> tuple[Any, ...]:
    config = {k: v for k, v in block.get_config().items() if k != "name"}
    adapters = [(layer.lora_rank, layer.lora_alpha) for layer in block.projections]
    computed = [  # policies of a map are found by names, and quantizers are in no configuration
        (layer.compute_dtype, layer.quantization_mode, _quantizes_inputs(layer))
        for layer in flatten_layers(block)
    ]
    variables = [(v.shape, v.dtype) for v in block.variables]
    return type(block), config, adapters, computed, variables


def _quantizes_inputs(layer: keras.Layer) -> bool:
    return getattr(layer, "inputs_quantizer", None) is not None
