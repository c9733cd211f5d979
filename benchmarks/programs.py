"""The programs of generation, lowered for shapes alone, for `counts.py` and `tpu_aot.py`."""

from collections.abc import Callable

import jax
from jax.stages import Lowered

from keras_mamba2 import Mamba2CausalLM
from keras_mamba2.generation import Generator
from keras_mamba2.generation.decode import Rows
from keras_mamba2.generation.decode import model_variables
from keras_mamba2.generation.generator import STOP_TOKEN_CAPACITY

Place = Callable[..., jax.ShapeDtypeStruct]  # (shape, dtype) -> argument


def decode_program(lm: Mamba2CausalLM, batch_size: int, place: Place) -> Lowered:
    """The decode loop of a model that samples greedily."""
    state = _state(lm, batch_size, place)
    rows = Rows(state, place((batch_size,), "int32"), place((batch_size, 0), "bool"))
    rest = (place((), "int32"), place((STOP_TOKEN_CAPACITY,), "int32"))
    return Generator(lm)._decode.program.lower(_weights(lm, place), rows, rest)


def prefill_program(lm: Mamba2CausalLM, batch_size: int, tokens: int, place: Place) -> Lowered:
    """The prefill of one block."""
    state, block = _state(lm, batch_size, place), (batch_size, tokens)
    inputs = (place(block, "int32"), place(block, "bool"))
    return Generator(lm)._prefill_block.program.lower(_weights(lm, place), state, inputs)


def _weights(lm, place):
    return [place(v.shape, v.dtype) for v in model_variables(lm)]


def _state(lm, batch_size, place):
    state = jax.eval_shape(lambda: lm.backbone.initial_state(batch_size))
    return jax.tree.map(lambda leaf: place(leaf.shape, leaf.dtype), state)
