"""The decode loop: one `while_loop` from a state and a token to many tokens."""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops
from keras import tree

from keras_mamba2.generation.picking import pick
from keras_mamba2.host.rows import NO_TOKEN
from keras_mamba2.host.rows import NOT_FINITE
from keras_mamba2.host.rows import Rows
from keras_mamba2.ops.platform import platform
from keras_mamba2.state.digest import digest_after

# From so many rows on most of a step's traffic is the state, and a step that only reads it moves a
# quarter less in all on a TPU: benchmarks/README.md. Elsewhere nothing is gained: on an H100 a step
# of 64 rows of 130M takes 1.59 ms so, and 1.50 if each step writes, in fewer kernels.
MANY_ROWS, STEPS_A_WRITE = 16, 12


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
    steps_a_write: int = 1,
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
        steps_a_write: int. Above 1 the state is only read in a step, and written after so many.
        num_likely: int k, how many of the likeliest tokens to return with theirs.
        asked: bool scalar, whether log probabilities are wanted in this run; if not, they are
            zeros, and cost nothing. `None` for always.

    Returns:
        Tuple `(rows, tokens, logprobs, likely)`: `tokens` int32 `(b capacity)`, -1 after a row has
        stopped, -2 where it stops because its logits are not finite; `logprobs` float32
        `(b capacity)`, or `(b 0)`; `likely` a `Likely`.
    """
    b = ops.shape(rows.remaining)[0]
    rows = rows._replace(state=model.backbone.in_loop(rows.state))
    written = [
        ops.full((b, capacity), NO_TOKEN, dtype="int32"),
        ops.zeros((b, capacity if with_logprobs else 0), "float32"),
        ops.zeros((b, capacity, num_likely), "int32"),
        ops.zeros((b, capacity, num_likely), "float32"),
    ]

    def keep_going(i, leaves, written):
        remaining = tree.pack_sequence_as(rows, leaves).remaining
        return ops.logical_and(i < num_steps, ops.any(remaining > 0))

    def add_token(i, logits, digest, now, written):
        """The rows, and what was written so far, with the token after `logits` `(b v)`."""
        tokens, logprobs, *likely = written
        going = now.remaining > 0  # (b)
        next_token = ops.cast(pick(sampler, logits, now, digest), "int32")
        is_finite = ops.isfinite(ops.max(logits, axis=-1))
        next_token = ops.where(going, next_token, now.state.token)
        token = ops.where(going, ops.where(is_finite, next_token, NOT_FINITE), NO_TOKEN)
        tokens = ops.slice_update(tokens, (0, i), token[:, None])
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
            state=now.state.with_token(next_token),
            remaining=ops.where(stopped, 0, ops.maximum(now.remaining - 1, 0)),
            seen=ops.logical_or(now.seen, ops.arange(now.seen.shape[1]) == next_token[:, None]),
        )
        return new, [tokens, logprobs, *likely]

    step = next_logits(model)

    def one_step(i, leaves, written):
        now = tree.pack_sequence_as(rows, leaves)
        logits, state = step(now.state, now.remaining > 0, i)
        now, written = add_token(i, logits, state.digest, now._replace(state=state), written)
        return i + 1, tree.flatten(now), written

    def several_steps(i, leaves, written):
        """Reads tokens into an open chunk, and writes the state once for all of them."""
        now = tree.pack_sequence_as(rows, leaves)
        chunk = model.backbone.open_chunk(b, steps_a_write)
        extend, commit = extending(model)

        def body(j, count, digest, chunk, leaves, written):
            now = tree.pack_sequence_as(rows, leaves)
            logits, chunk = extend(now.state, chunk, j)
            count = count + ops.cast(now.remaining > 0, "int32")
            digest = digest_after(digest, now.state.token[:, None])
            now, written = add_token(i + j, logits, digest, now, written)
            return j + 1, count, digest, chunk, tree.flatten(now), written

        def in_chunk(j, count, digest, chunk, leaves, written):
            return ops.logical_and(j < steps_a_write, keep_going(i + j, leaves, written))

        zero = ops.zeros((), "int32")
        loop_vars = (zero, ops.zeros((b,), "int32"), now.state.digest, chunk)
        loop_vars = ops.while_loop(in_chunk, body, (*loop_vars, leaves, written))
        j, count, _, chunk, leaves, written = loop_vars
        now = tree.pack_sequence_as(rows, leaves)
        now = now._replace(state=commit(now.state, chunk, count))
        return i + j, tree.flatten(now), written

    start = ops.convert_to_tensor(0, "int32")
    # Flat, since loops of TensorFlow take only pytrees of its own kind.
    loop_vars = (start, tree.flatten(rows), written)
    body = one_step if steps_a_write == 1 else several_steps
    _, leaves, (tokens, logprobs, *likely) = ops.while_loop(keep_going, body, loop_vars)
    rows = tree.pack_sequence_as(rows, leaves)
    rows = rows._replace(state=model.backbone.after_loop(rows.state))
    return rows, tokens, logprobs, Likely(*likely)


def default_steps_a_write(batch_size: int) -> int:
    """The `steps_a_write` that is fast on the platform. It changes results by rounding only."""
    on_tpu = keras.config.backend() == "jax" and platform() == "tpu"
    return STEPS_A_WRITE if on_tpu and batch_size >= MANY_ROWS else 1


def next_logits(model):
    """A function `step(state, going, i)`: logits `(b v)` after each last token, and the state."""

    def step(state, going, i):
        logits, _, state = model.call_with_cache(
            state.token[:, None], state, i, padding_mask=going[:, None]
        )
        return logits[:, -1], state

    return inside_loop(model_variables(model), step)


def extending(model):
    """Functions `extend(state, chunk, j)`, the logits `(b v)` and the chunk, and `commit`."""

    def extend(state, chunk, j):
        hidden_states, chunk = model.backbone.extend(state.token[:, None], state, chunk, j)
        return model.logits(hidden_states[:, 0]), chunk

    variables = model_variables(model)
    return inside_loop(variables, extend), inside_loop(variables, model.backbone.commit)


def inside_loop(variables: list[keras.Variable], function):
    """`function`, which reads `variables`, for the body of a loop.

    On JAX the loop may not read variables: their values are constants of the loop.
    """
    if keras.config.backend() != "jax":
        return function

    values = [(v, ops.convert_to_tensor(v)) for v in variables]

    def pure(*args):
        with keras.StatelessScope(state_mapping=values):
            return function(*args)

    return pure


def logprob(logits, token_ids):
    """The model's log probabilities `(...)` of `token_ids` `(...)`, before the sampler's filters.

    In float32, of logits `(... v)` in any dtype.
    """
    logprobs = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    token_ids = ops.cast(token_ids, "int32")
    return ops.take_along_axis(logprobs, token_ids[..., None], axis=-1)[..., 0]


def likeliest_tokens(logits, k: int):
    """The `k` likeliest ids `(b k)` after logits `(b v)`, and the model's log probabilities."""
    logprobs, token_ids = ops.top_k(ops.log_softmax(ops.cast(logits, "float32"), axis=-1), k)
    return [ops.cast(token_ids, "int32"), logprobs]


def if_asked(asked, compute, zeros):
    """`compute()`, or zeros where `asked` is given and false."""
    return compute() if asked is None else ops.cond(asked, compute, lambda: zeros)


def model_variables(model) -> list[keras.Variable]:
    """The variables that generation reads: all but those of the optimizer and the metrics."""
    # One walk over all layers, at every call of a program: a list of either kind takes one too.
    variables = sorted(model.variables, key=lambda variable: not variable.trainable)
    stacked = model.backbone.stacked
    return variables if stacked is None else stacked.in_place_of_theirs(variables)
