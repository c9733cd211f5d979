"""The decode loop: one `while_loop` from a state and a token to many tokens."""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops
from keras import tree

from keras_mamba2.generation.picking import pick
from keras_mamba2.generation.rows import Rows
from keras_mamba2.state import NO_TOKEN

NOT_FINITE = -2  # instead of a token: the logits were NaN or infinite


class Likely(NamedTuple):
    """The likeliest tokens at each place, beside the one that was picked."""

    token_ids: Any  # (b capacity k) int32
    logprobs: Any  # (b capacity k) float32


def decode(
    model,
    sampler,
    rows: Rows,
    num_steps,
    capacity: int,
    with_logprobs: bool = False,
    num_likely: int = 0,
    asked=None,
):
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
        num_likely: int k, how many of the likeliest tokens to return with theirs.
        asked: bool scalar, whether log probabilities are wanted in this run; if not, they are
            zeros, and cost nothing. `None` for always.

    Returns:
        Tuple `(rows, tokens, logprobs, likely)`: `tokens` int32 `(b capacity)`, -1 after a row has
        stopped, -2 where it stops because its logits are not finite; `logprobs` float32
        `(b capacity)`, or `(b 0)`; `likely` a `Likely`.
    """
    b = ops.shape(rows.remaining)[0]
    tokens = ops.full((b, capacity), NO_TOKEN, dtype="int32")
    logprobs = ops.zeros((b, capacity if with_logprobs else 0), "float32")
    likely = Likely(
        ops.zeros((b, capacity, num_likely), "int32"),
        ops.zeros((b, capacity, num_likely), "float32"),
    )
    step = next_logits(model)

    def keep_going(i, leaves, *written):
        remaining = tree.pack_sequence_as(rows, leaves).remaining
        return ops.logical_and(i < num_steps, ops.any(remaining > 0))

    def body(i, leaves, tokens, logprobs, likely):
        now = tree.pack_sequence_as(rows, leaves)
        going = now.remaining > 0  # (b)
        logits, state = step(now.state, going, i)
        next_token = pick(sampler, logits, now, state.digest)
        is_finite = ops.isfinite(ops.max(logits, axis=-1))
        next_token = ops.where(going, ops.cast(next_token, "int32"), now.state.token)
        written = ops.where(going, ops.where(is_finite, next_token, NOT_FINITE), NO_TOKEN)
        tokens = ops.slice_update(tokens, (0, i), written[:, None])
        if with_logprobs:
            zeros = ops.zeros((b,), "float32")
            found = if_asked(asked, lambda: logprob(logits, next_token), zeros)
            logprobs = ops.slice_update(logprobs, (0, i), found[:, None])
        if num_likely:
            zeros = [ops.zeros((b, num_likely), leaf.dtype) for leaf in likely]
            found = if_asked(asked, lambda: likeliest_tokens(logits, num_likely), zeros)
            likely = [
                ops.slice_update(leaf, (0, i, 0), new[:, None])
                for leaf, new in zip(likely, found, strict=True)
            ]
        stopped = ops.any(next_token[:, None] == now.stop_token_ids, axis=1)
        stopped = ops.logical_or(stopped, ops.logical_not(is_finite))
        new = now._replace(
            state=state.with_token(next_token),
            remaining=ops.where(stopped, 0, ops.maximum(now.remaining - 1, 0)),
            seen=ops.logical_or(now.seen, ops.arange(now.seen.shape[1]) == next_token[:, None]),
        )
        return i + 1, tree.flatten(new), tokens, logprobs, list(likely)

    start = ops.convert_to_tensor(0, "int32")
    # Flat, since loops of TensorFlow take only pytrees of its own kind.
    loop_vars = (start, tree.flatten(rows), tokens, logprobs, list(likely))
    _, leaves, tokens, logprobs, likely = ops.while_loop(keep_going, body, loop_vars)
    return tree.pack_sequence_as(rows, leaves), tokens, logprobs, Likely(*likely)


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


def likeliest_tokens(logits, k: int):
    """The `k` likeliest ids `(b k)` after logits `(b v)`, and the model's log probabilities."""
    logprobs, token_ids = ops.top_k(ops.log_softmax(ops.cast(logits, "float32"), axis=-1), k)
    return [ops.cast(token_ids, "int32"), logprobs]


def if_asked(asked, compute, zeros):
    """`compute()`, or zeros where `asked` is given and false."""
    return compute() if asked is None else ops.cond(asked, compute, lambda: zeros)


def model_variables(model) -> list[keras.Variable]:
    """The variables that generation reads: all but those of the optimizer and the metrics."""
    return [*model.trainable_variables, *model.non_trainable_variables]
