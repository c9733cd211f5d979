"""The decode loop: one `while_loop` from a state and a token to many tokens."""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops
from keras import tree

from keras_mamba2.generation.sampler import next_tokens
from keras_mamba2.state import NO_TOKEN


class Rows(NamedTuple):
    """Where each row of the batch stands. Batch first, as the state."""

    state: Any  # Mamba2State, the last token of each row waiting in it
    remaining: Any  # (b) int32, how many more tokens may come; 0 for a row that has stopped
    seen: Any  # (b v) bool, which ids a row has had, for a sampler that asks; else (b 0)


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
    b = ops.shape(rows.remaining)[0]
    tokens = ops.full((b, capacity), NO_TOKEN, dtype="int32")
    step = stateless_step(model, sampler)

    def keep_going(i, sampler_values, leaves, tokens):
        remaining = tree.pack_sequence_as(rows, leaves).remaining
        return ops.logical_and(i < num_steps, ops.any(remaining > 0))

    def body(i, sampler_values, leaves, tokens):
        state, remaining, seen = tree.pack_sequence_as(rows, leaves)
        going = remaining > 0  # (b)
        next_token, new_state, sampler_values = step(sampler_values, state, going, seen, i)
        next_token = ops.where(going, ops.cast(next_token, "int32"), state.token)
        tokens = ops.slice_update(tokens, (0, i), ops.where(going, next_token, NO_TOKEN)[:, None])
        stopped = ops.any(next_token[:, None] == stop_token_ids, axis=1)
        remaining = ops.where(stopped, 0, ops.maximum(remaining - 1, 0))
        seen = ops.logical_or(seen, ops.arange(seen.shape[1]) == next_token[:, None])
        leaves = tree.flatten(Rows(new_state.with_token(next_token), remaining, seen))
        return i + 1, sampler_values, leaves, tokens

    start = ops.convert_to_tensor(0, "int32")
    sampler_values = [ops.convert_to_tensor(v) for v in sampler.variables]
    # Flat, since the loops of TensorFlow know no pytrees but their own.
    loop_vars = (start, sampler_values, tree.flatten(rows), tokens)
    _, sampler_values, leaves, tokens = ops.while_loop(keep_going, body, loop_vars)
    for variable, value in zip(sampler.variables, sampler_values, strict=True):
        variable.assign(value)
    return tree.pack_sequence_as(rows, leaves), tokens


def stateless_step(model, sampler):
    """One step as a function of the sampler's variables, which hold where its random numbers are.

    On JAX the loop may not assign variables: the seeds are carried, the weights are constants
    of the loop.
    """

    def step(state, going, seen, i):
        logits, _, state = model.call_with_cache(
            state.token[:, None], state, i, padding_mask=going[:, None]
        )
        return next_tokens(sampler, logits[:, -1], seen), state

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
