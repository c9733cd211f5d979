"""The decode loop: one `while_loop` from a state and a token to many tokens."""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops
from keras import tree

NO_TOKEN = -1


class Rows(NamedTuple):
    """Where each row of the batch stands. Batch first, as the state."""

    state: Any  # Mamba2State after all tokens but the last
    token: Any  # (b) int32, the last token, not yet fed
    remaining: Any  # (b) int32, how many more tokens may come; 0 for a row that has stopped


def decode(model, sampler, rows: Rows, num_steps, stop_token_ids, capacity: int):
    """Samples up to `num_steps` tokens a row, fewer where all rows stop before.

    A row stops with a stop token, or when nothing remains to it. Its state is then left as it
    is, so that every token touches the state exactly once.

    Args:
        model: a `Mamba2CausalLM`.
        sampler: a KerasHub sampler that picks tokens by `get_next_token`.
        rows: where the rows stand.
        num_steps: int scalar, at most `capacity`. Traced, so any number is one program.
        stop_token_ids: int32 `(s)`.
        capacity: int, the size of the result.

    Returns:
        Tuple `(rows, tokens)`, tokens int32 `(b capacity)` with -1 where a row had stopped.
    """
    leaves = tree.flatten(rows.state)
    b = ops.shape(rows.token)[0]
    tokens = ops.full((b, capacity), NO_TOKEN, dtype="int32")
    step = stateless_step(model, sampler)

    def keep_going(i, sampler_values, leaves, token, remaining, tokens):
        return ops.logical_and(i < num_steps, ops.any(remaining > 0))

    def body(i, sampler_values, leaves, token, remaining, tokens):
        state = tree.pack_sequence_as(rows.state, leaves)
        going = remaining > 0  # (b)
        next_token, state, sampler_values = step(sampler_values, token, state, going, i)
        next_token = ops.where(going, ops.cast(next_token, "int32"), token)
        column = ops.where(going, next_token, NO_TOKEN)
        tokens = ops.slice_update(tokens, (0, i), column[:, None])
        stopped = ops.any(next_token[:, None] == stop_token_ids, axis=1)
        remaining = ops.where(stopped, 0, ops.maximum(remaining - 1, 0))
        return i + 1, sampler_values, tree.flatten(state), next_token, remaining, tokens

    start = ops.convert_to_tensor(0, "int32")
    sampler_values = [ops.convert_to_tensor(v) for v in sampler.variables]
    loop_vars = (start, sampler_values, leaves, rows.token, rows.remaining, tokens)
    _, sampler_values, leaves, token, remaining, tokens = ops.while_loop(
        keep_going, body, loop_vars
    )
    for variable, value in zip(sampler.variables, sampler_values, strict=True):
        variable.assign(value)
    return Rows(tree.pack_sequence_as(rows.state, leaves), token, remaining), tokens


def stateless_step(model, sampler):
    """One step as a function of the sampler's variables, the seeds of its random numbers.

    On JAX the loop may not assign variables: the seeds are carried, the weights are constants
    of the loop.
    """

    def step(token, state, going, i):
        logits, _, state = model.call_with_cache(
            token[:, None], state, i, padding_mask=going[:, None]
        )
        probabilities = sampler.compute_probabilities(logits[:, -1])
        return sampler.get_next_token(probabilities), state

    if keras.config.backend() != "jax":

        def assigning_step(sampler_values, *args):
            return *step(*args), sampler_values

        return assigning_step

    weights = [(v, ops.convert_to_tensor(v)) for v in model_variables(model)]

    def pure_step(sampler_values, *args):
        mapping = [*weights, *zip(sampler.variables, sampler_values, strict=True)]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            next_token, state = step(*args)
        values = [scope.get_current_value(v) for v in sampler.variables]
        return next_token, state, values

    return pure_step


def model_variables(model) -> list[keras.Variable]:
    """All that generation reads: not the optimizer's variables, not the metrics'."""
    return [*model.trainable_variables, *model.non_trainable_variables]
