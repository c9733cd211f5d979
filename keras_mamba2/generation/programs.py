"""Turns a function that reads a model's variables into a compiled program, on every backend."""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops
from keras import tree

from keras_mamba2._compat.keras_variables import has_value
from keras_mamba2.compiled_folder import use_folder
from keras_mamba2.generation.decode import model_variables


def compiled(
    model,
    function,
    donate: bool = False,
    static: tuple[str, ...] = (),
    assigned=(),
    read: Callable[[], list[keras.Variable]] = list,
):
    """Compiles `function(first, *args, **static)`, which may call `model`.

    On JAX variables are arguments of the program, so that a change of weights is seen and no
    weight is copied into it. A model with `run_eagerly=True` gets the function itself. Arguments
    may be numpy arrays: on JAX, making tensors of them outside would compile another program for
    every shape.

    Args:
        model: a `Mamba2CausalLM`.
        function: what to compile.
        donate: bool, whether the first argument's memory may be reused for the result.
        static: names of keyword arguments that the program is compiled for.
        assigned: variables that `function` assigns, such as the random generators of a sampler
            with a loop of its own.
        read: function that returns further variables that `function` reads.
    """
    backend = keras.config.backend()
    if backend == "torch":
        return _on_tensors(_without_gradients(function))
    if model.run_eagerly:
        return _on_tensors(function)
    if backend == "tensorflow":
        return _on_tensors(_tensorflow_function(model, function))
    return _jitted(model, function, donate, static, assigned, read)


def _on_tensors(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*tree.map_structure(ops.convert_to_tensor, args), **kwargs)

    return call


def _tensorflow_function(model, function):
    """A `tf.function` that takes and returns any pytree, not only those of TensorFlow."""
    programs: dict[Any, Callable] = {}

    @functools.wraps(function)
    def call(*args, **kwargs):
        # Each structure has a program, since a `tf.function` sees leaves only.
        paths = tuple(path for path, _ in tree.flatten_with_path(args))
        key = paths, tuple(sorted(kwargs.items())), model.backbone.adapter_scales
        if key not in programs:
            arguments = tree.map_structure(lambda _: None, args)
            programs[key] = _of_structure(function, arguments, kwargs)
        return programs[key](tree.flatten(args))

    return call


def _of_structure(function, arguments, kwargs):
    """`function` of the leaves of `arguments`, compiled."""
    import tensorflow as tf

    structure: dict[str, Any] = {}

    @tf.function(autograph=False)
    def program(leaves):
        result = function(*tree.pack_sequence_as(arguments, leaves), **kwargs)
        structure["result"] = tree.map_structure(lambda _: None, result)
        return tree.flatten(result)

    def call(leaves):
        leaves = program(leaves)
        return tree.pack_sequence_as(structure["result"], leaves)

    return call


def _without_gradients(function):
    import torch

    return torch.no_grad()(function)


def _jitted(model, function, donate, static, assigned, read):
    import jax

    def variables():
        return [*model_variables(model), *read(), *assigned]

    def run(values, first, args, adapters=(), **kwargs):
        # Of `adapters` the program has the scales, which are constants in it.
        mapping = list(zip(variables(), values, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            result = function(first, *args, **kwargs)
        return result, [scope.get_current_value(v) for v in assigned]

    run.__name__ = f"keras_mamba2_{function.__name__}"  # which profiles and XLA's dumps show
    static = (*static, "adapters")
    program = jax.jit(run, donate_argnums=(1,) if donate else (), static_argnames=static)

    @functools.wraps(function)
    def call(first, *args, **kwargs):
        adapters = model.backbone.adapter_scales
        values = [v.value for v in variables()]
        result, values = program(values, first, args, adapters=adapters, **kwargs)
        for variable, value in zip(assigned, values, strict=True):
            variable.assign(value)
        return result

    def prepare(first, *args, **kwargs):
        values = [
            v.value if has_value(v) else jax.ShapeDtypeStruct(v.shape, v.dtype) for v in variables()
        ]
        adapters = model.backbone.adapter_scales
        lowered = program.lower(values, first, args, adapters=adapters, **kwargs)
        lowered.compile()  # kept by JAX, for a call with arguments of these shapes
        result, _ = lowered.out_info
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), result)

    vars(call)["program"], vars(call)["prepare"] = program, prepare
    return call


def prepare(call, first, *args, **kwargs):
    """Compiles a program of `compiled` for arguments of these shapes.

    On JAX nothing runs and no variable needs a value: arguments, and what is returned, may be
    `jax.ShapeDtypeStruct`. Elsewhere, and in a distribution, it is a call with its result.
    """
    if keras.distribution.distribution() is not None:
        return call(first, *args, **kwargs)
    return vars(call).get("prepare", call)(first, *args, **kwargs)


def use_compilation_cache(folder) -> None:
    """Keeps the programs that JAX compiles in `folder`, for later processes.

    Other backends have no such cache; there it does nothing.
    """
    if keras.config.backend() == "jax":
        use_folder(folder)
