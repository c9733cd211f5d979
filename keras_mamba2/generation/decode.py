"""The decode loop: one `while_loop` from a state and a token to many tokens."""

import keras
from keras import ops
from keras import tree

from keras_mamba2.generation.picking import pick
from keras_mamba2.host.rows import NO_TOKEN
from keras_mamba2.host.rows import NOT_FINITE
from keras_mamba2.host.rows import Rows


def decode(model, sampler, rows: Rows, num_steps, capacity: int, with_logprobs: bool = False):
    """Picks up to `num_steps` tokens per row, fewer if all rows stop earlier.

    A row stops at one of its stop tokens, or when it has no tokens remaining. Its state then
    stays as it is, so that every token changes the state exactly once.

    Args:
        model: a `Mamba2CausalLM`.
        sampler: a KerasHub sampler that picks tokens by `get_next_token`; a `FilterSampler` for
            rows with their own sampling parameters.
        rows: `Rows`, the progress of each row.
        num_steps: int scalar, at most `capacity`. Traced, so that one program serves any number.
        capacity: int, the size of the result.
        with_logprobs: bool, whether to return the log probabilities of the tokens.

    Returns:
        Tuple `(rows, tokens, logprobs)`: `tokens` int32 `(b capacity)`, -1 after a row has
        stopped, -2 where it stops because its logits are not finite; `logprobs` float32
        `(b capacity)`, or `(b 0)`.
    """
    b = ops.shape(rows.remaining)[0]
    tokens = ops.full((b, capacity), NO_TOKEN, dtype="int32")
    logprobs = ops.zeros((b, capacity if with_logprobs else 0), "float32")
    step = next_logits(model)

    def keep_going(i, leaves, tokens, logprobs):
        remaining = tree.pack_sequence_as(rows, leaves).remaining
        return ops.logical_and(i < num_steps, ops.any(remaining > 0))

    def body(i, leaves, tokens, logprobs):
        now = tree.pack_sequence_as(rows, leaves)
        going = now.remaining > 0  # (b)
        logits, state = step(now.state, going, i)
        next_token = pick(sampler, logits, now, state.digest)
        is_finite = ops.isfinite(ops.max(logits, axis=-1))
        next_token = ops.where(going, ops.cast(next_token, "int32"), now.state.token)
        written = ops.where(going, ops.where(is_finite, next_token, NOT_FINITE), NO_TOKEN)
        tokens = ops.slice_update(tokens, (0, i), written[:, None])
        if with_logprobs:
            logprobs = ops.slice_update(logprobs, (0, i), logprob(logits, next_token)[:, None])
        stopped = ops.any(next_token[:, None] == now.stop_token_ids, axis=1)
        stopped = ops.logical_or(stopped, ops.logical_not(is_finite))
        new = now._replace(
            state=state.with_token(next_token),
            remaining=ops.where(stopped, 0, ops.maximum(now.remaining - 1, 0)),
            seen=ops.logical_or(now.seen, ops.arange(now.seen.shape[1]) == next_token[:, None]),
        )
        return i + 1, tree.flatten(new), tokens, logprobs

    start = ops.convert_to_tensor(0, "int32")
    # Flat, since loops of TensorFlow take only pytrees of its own kind.
    loop_vars = (start, tree.flatten(rows), tokens, logprobs)
    _, leaves, tokens, logprobs = ops.while_loop(keep_going, body, loop_vars)
    return tree.pack_sequence_as(rows, leaves), tokens, logprobs


def next_logits(model):
    """A function `step(state, going, i)`: the logits `(b v)` after each last token, and the state.

    On JAX the loop may not read variables: the weights are constants of the loop.
    """

    def step(state, going, i):
        logits, _, state = model.call_with_cache(
            state.token[:, None], state, i, padding_mask=going[:, None]
        )
        return logits[:, -1], state

    if keras.config.backend() != "jax":
        return step

    weights = [(v, ops.convert_to_tensor(v)) for v in model_variables(model)]

    def pure_step(*args):
        with keras.StatelessScope(state_mapping=weights):
            return step(*args)

    return pure_step


def logprob(logits, token_ids):
    """The model's log probabilities `(b)` of `token_ids` `(b)`, before the sampler's filters."""
    logprobs = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    return ops.take_along_axis(logprobs, token_ids[:, None], axis=-1)[:, 0]


def model_variables(model) -> list[keras.Variable]:
    """The variables that generation reads: all but those of the optimizer and the metrics."""
    return [*model.trainable_variables, *model.non_trainable_variables]
