"""The programs of generation, traced for shapes alone, for `counts.py` and `tpu_aot.py`."""

import math
from collections.abc import Callable

import jax
import keras
import numpy as np
from jax.extend.core import Jaxpr
from jax.extend.core import jaxprs_in_params
from jax.stages import Traced

from benchmarks.workload import Workload
from keras_mamba2 import Mamba2Backbone
from keras_mamba2 import Mamba2CausalLM
from keras_mamba2.conversion.deferred import deferred_initialization
from keras_mamba2.generation import Generator
from keras_mamba2.generation.decode import model_variables
from keras_mamba2.host.blocks import blocks
from keras_mamba2.host.rows import STOP_TOKEN_CAPACITY
from keras_mamba2.host.rows import Rows
from keras_mamba2.state import NO_TOKEN

Place = Callable[..., jax.ShapeDtypeStruct]  # (shape, dtype) -> argument


def abstract_model(
    workload: Workload, quantization: str | None = None, stacked: bool = False, **arguments
) -> Mamba2CausalLM:
    """A model whose variables have shapes and no values: 2.7B would not fit everywhere."""
    arguments = {**workload.model, "chunk_size": workload.chunk_size, **arguments}
    if quantization:
        arguments["dtype"] = _quantized_dtype(quantization, arguments)
    with deferred_initialization():
        backbone = Mamba2Backbone(**arguments)
    lm = Mamba2CausalLM(backbone)
    lm.compile(sampler="greedy")
    if stacked:
        lm.stack_blocks()
    return lm


def _quantized_dtype(mode: str, arguments):
    """The dtype policies of a quantized model, taken from a small one: to quantize takes values."""
    sizes = {"vocabulary_size": 16, "unpadded_vocabulary_size": None, "hidden_dim": 64}
    small = Mamba2Backbone(**{**arguments, **sizes, "head_dim": 16, "state_dim": 16})
    small.quantize(mode)
    return keras.dtype_policies.get(small.get_config()["dtype"])


def decode_program(
    lm: Mamba2CausalLM, batch_size: int, place: Place, steps_a_write: int = 1
) -> Traced:
    """The decode loop of a model that samples greedily."""
    rows = _rows(_state(lm, batch_size, place), place)
    program = Generator(lm, steps_a_write)._decode.program
    return program.trace(_weights(lm, place), rows, (place((), "int32"),))


def speculative_program(lm: Mamba2CausalLM, num_tokens: int, place: Place) -> Traced:
    """The loop of one row with proposals, of a model that was compiled with `speculation`."""
    proposer = lm.speculation
    context = jax.eval_shape(lambda: proposer.empty(1))
    context = jax.tree.map(lambda leaf: place(leaf.shape, leaf.dtype), context)
    rows = _rows(_state(lm, 1, place), place)._replace(context=context)
    weights = [*_weights(lm, place), *(place(v.shape, v.dtype) for v in proposer.variables)]
    program = Generator(lm)._speculate.program
    return program.trace(weights, rows, (place((), "int32"),), num_tokens=num_tokens)


def rows_and_weights(lm: Mamba2CausalLM, state, place: Place):
    """The weights, and the rows of a model that samples greedily with the shapes of `state`."""
    state = jax.tree.map(lambda leaf: place(leaf.shape, leaf.dtype), state)
    return _weights(lm, place), _rows(state, place)


def prefill_program(lm: Mamba2CausalLM, batch_size: int, tokens: int, place: Place) -> Traced:
    """The prefill of one block."""
    state, block = _state(lm, batch_size, place), (batch_size, tokens)
    inputs = (place(block, "int32"), place(block, "bool"))
    return Generator(lm)._prefill_block.program.trace(_weights(lm, place), state, inputs)


def programs_of_one(lm: Mamba2CausalLM, token_ids: np.ndarray) -> Callable[[], None]:
    """What `generate` runs for one new token after `(1 t)`, without the host's work around it.

    Compiled programs, called with arguments that lie on the device but for a few numbers.
    """
    generator, weights = Generator(lm), [v.value for v in model_variables(lm)]
    pieces = [jax.device_put(piece) for piece in blocks([token_ids[0, :-1]])]
    rest = jax.device_put((np.int32(1),))
    last = token_ids[:, -1]
    one_row = np.zeros(1, "int8")
    state = generator._zeros(one_row)
    prefill = [
        generator._prefill_block.program.lower(weights, state, piece).compile() for piece in pieces
    ]

    # Not on the device, since the decode loop takes their memory.
    def rows(state):
        return Rows(
            state.with_token(last),
            remaining=np.array([1], "int32"),
            stop_token_ids=np.full((1, STOP_TOKEN_CAPACITY), NO_TOKEN, "int32"),
            seen=np.zeros((1, 0), bool),
            keys=np.zeros((1, 0), "int32"),
            sampling=(),
        )

    decode = generator._decode.program.lower(weights, rows(state), rest).compile()

    def run() -> None:
        state = generator._zeros(one_row)
        for program, piece in zip(prefill, pieces, strict=True):
            state, _ = program(weights, state, piece)
        jax.block_until_ready(decode(weights, rows(state), rest))

    return run


def _rows(state, place) -> Rows:
    """The rows of a model that samples greedily."""
    b = state.batch_size
    return Rows(
        state,
        remaining=place((b,), "int32"),
        stop_token_ids=place((b, STOP_TOKEN_CAPACITY), "int32"),
        seen=place((b, 0), "bool"),
        keys=place((b, 0), "int32"),
        sampling=(),
    )


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
