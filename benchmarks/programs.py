"""The programs of generation, traced for shapes alone, for `counts.py` and `tpu_aot.py`."""

import math
from collections.abc import Callable

import jax
from jax.extend.core import Jaxpr
from jax.extend.core import jaxprs_in_params
from jax.stages import Traced

from keras_mamba2 import Mamba2CausalLM
from keras_mamba2.generation import Generator
from keras_mamba2.generation.decode import Rows
from keras_mamba2.generation.decode import model_variables
from keras_mamba2.generation.generator import STOP_TOKEN_CAPACITY

Place = Callable[..., jax.ShapeDtypeStruct]  # (shape, dtype) -> argument


def decode_program(lm: Mamba2CausalLM, batch_size: int, place: Place) -> Traced:
    """The decode loop of a model that samples greedily."""
    state = _state(lm, batch_size, place)
    rows = Rows(state, place((batch_size,), "int32"), place((batch_size, 0), "bool"))
    rest = (place((), "int32"), place((STOP_TOKEN_CAPACITY,), "int32"))
    return Generator(lm)._decode.program.trace(_weights(lm, place), rows, rest)


def prefill_program(lm: Mamba2CausalLM, batch_size: int, tokens: int, place: Place) -> Traced:
    """The prefill of one block."""
    state, block = _state(lm, batch_size, place), (batch_size, tokens)
    inputs = (place(block, "int32"), place(block, "bool"))
    return Generator(lm)._prefill_block.program.trace(_weights(lm, place), state, inputs)


def _weights(lm, place):
    return [place(v.shape, v.dtype) for v in model_variables(lm)]


def _state(lm, batch_size, place):
    state = jax.eval_shape(lambda: lm.backbone.initial_state(batch_size))
    return jax.tree.map(lambda leaf: place(leaf.shape, leaf.dtype), state)


def product_flops(jaxpr: Jaxpr) -> int:
    """Operations of all matrix products, two a multiply-add; a scan's as often as it runs.

    XLA's own count takes the body of a loop once. A loop of unknown length counts once here too,
    and of several branches, which may be platforms, the longest.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            summands = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * equation.outvars[0].aval.size * summands
        parts = [product_flops(part) for part in jaxprs_in_params(equation.params)]
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(parts) if equation.primitive.name != "cond" else max(parts)
    return total
