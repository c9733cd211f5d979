"""Generation as programs for `jax.export`: functions of arrays, for one batch size each.

Their arguments are lists of arrays, so that a program is read without any class of ours. The order
is that of `portable/engine.py`, which calls them.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops
from keras import tree

from keras_mamba2.generation.decode import decode
from keras_mamba2.generation.decode import default_steps_a_write
from keras_mamba2.generation.picking import needs_history
from keras_mamba2.generation.prefill import prefill_block
from keras_mamba2.generation.prefill import prefill_row
from keras_mamba2.generation.sampler import FilterSampler
from keras_mamba2.host.blocks import BLOCK_SIZES
from keras_mamba2.host.rows import DECODE_CAPACITY
from keras_mamba2.host.rows import STOP_TOKEN_CAPACITY
from keras_mamba2.host.rows import Rows
from keras_mamba2.host.sampling import Sampling
from keras_mamba2.ops.platform import compiling_for
from keras_mamba2.state import Mamba2State


class Program(NamedTuple):
    """A function of lists of arrays, and the shapes that it is compiled for."""

    name: str
    function: Callable
    arguments: tuple[Any, ...]  # of `jax.ShapeDtypeStruct`


def programs(model, batch_size: int) -> Iterator[Program]:
    """What a loader needs to generate: `prefill_*` for each size of blocks, `decode*`.

    Where states have room for a number of tokens, that number is a symbol.
    """
    from jax import export

    b, v = batch_size, model.backbone.vocabulary_size
    specs = tree.flatten(model.backbone.state_spec())
    room: Any = export.symbolic_shape("room")[0]
    shapes = [[room if size is None else size for size in spec.shape] for spec in specs]
    state = [_array((b, *shape), spec.dtype) for shape, spec in zip(shapes, specs, strict=True)]
    state += [_array((b,), "int32")] * 3

    def of_flat(leaves) -> Mamba2State:
        *layers, token, length, digest = leaves
        layers = tree.pack_sequence_as(model.backbone.state_spec(), layers)
        return Mamba2State(layers, token, length, digest)

    def flat(state: Mamba2State) -> list[Any]:
        return [*tree.flatten(state.layers), state.token, state.length, state.digest]

    def prefill(state, token_ids, padding_mask):
        return flat(prefill_block(model, of_flat(state), token_ids, padding_mask))

    def prefill_one(state, row, token_ids):
        return flat(prefill_row(model, of_flat(state), row, token_ids))

    def decode_with(sampler):
        def decode_rows(state, remaining, stops, seen, keys, sampling, num_steps):
            sampling = Sampling(*sampling) if sampling else ()
            rows = Rows(of_flat(state), remaining, stops, seen, keys, sampling)
            steps = default_steps_a_write(b)
            rows, tokens, *_ = decode(
                model, sampler, rows, num_steps, DECODE_CAPACITY, steps_a_write=steps
            )
            return flat(rows.state), rows.remaining, rows.seen, tokens

        return decode_rows

    def decode_arguments(sampler, seen_size: int, with_parameters: bool):
        generators = sampler.variables
        dtype = generators[0].dtype if generators else "int32"
        parameters = Sampling.of_rows(b) if with_parameters else ()
        return (
            state,
            _array((b,), "int32"),
            _array((b, STOP_TOKEN_CAPACITY), "int32"),
            _array((b, seen_size), "bool"),
            _array((b, len(generators)), dtype),
            [_array(parameter.shape, parameter.dtype) for parameter in parameters],
            _array((), "int32"),
        )

    for size in BLOCK_SIZES:
        block = _array((b, size), "int32"), _array((b, size), "bool")
        yield Program(f"prefill_{size}", prefill, (state, *block))
    if b > 1:
        one = _array((), "int32"), _array((1, BLOCK_SIZES[0]), "int32")
        yield Program("prefill_row", prefill_one, (state, *one))
    own = model.sampler
    filters = own if type(own) is FilterSampler else FilterSampler()
    yield Program("decode", decode_with(filters), decode_arguments(filters, v, True))
    if type(own) is not FilterSampler:
        arguments = decode_arguments(own, v if needs_history(own) else 0, False)
        yield Program("decode_as_compiled", decode_with(own), arguments)


def serialized(model, program: Program, platform: str, weights: str) -> bytes:
    """A program compiled by `jax.export` for one platform.

    Args:
        model: a `Mamba2CausalLM`.
        program: one of `programs`.
        platform: string, JAX's name of it.
        weights: `"beside"` for the model's weights as first argument, a list of arrays; `"inside"`
            for constants.
    """
    import jax
    from jax import export

    variables = model.weights

    def run(values, *args):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return program.function(*args)

    if weights == "beside":
        shapes = [_array(variable.shape, variable.dtype) for variable in variables]
        function, arguments = run, (shapes, *program.arguments)
    else:
        values = [np.asarray(ops.convert_to_numpy(variable)) for variable in variables]
        function, arguments = lambda *args: run(values, *args), program.arguments
    with compiling_for(platform):
        exported = export.export(jax.jit(function), platforms=[platform])(*arguments)
    return bytes(exported.serialize())


def _array(shape: Sequence[int], dtype: str) -> Any:
    import jax

    return jax.ShapeDtypeStruct(tuple(shape), dtype)
