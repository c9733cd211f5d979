"""The decode loop: one `while_loop` from a state and a token to many tokens."""

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
# quarter less in all on a TPU: benchmarks/README.md. On a CPU nothing is gained.
MANY_ROWS, STEPS_A_WRITE = 16, 12


def decode(
    model,
    sampler,
    rows: Rows,
    num_steps,
    capacity: int,
    with_logprobs: bool = False,
    steps_a_write: int = 1,
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

    Returns:
        Tuple `(rows, tokens, logprobs)`: `tokens` int32 `(b capacity)`, -1 after a row has
        stopped, -2 where it stops because its logits are not finite; `logprobs` float32
        `(b capacity)`, or `(b 0)`.
    """
    b = ops.shape(rows.remaining)[0]
    tokens = ops.full((b, capacity), NO_TOKEN, dtype="int32")
    logprobs = ops.zeros((b, capacity if with_logprobs else 0), "float32")

    def keep_going(i, leaves, tokens, logprobs):
        remaining = tree.pack_sequence_as(rows, leaves).remaining
        return ops.logical_and(i < num_steps, ops.any(remaining > 0))

    def add_token(i, logits, digest, now, tokens, logprobs):
        """The rows, and the tokens so far, with the token after `logits` `(b v)`."""
        going = now.remaining > 0  # (b)
        next_token = ops.cast(pick(sampler, logits, now, digest), "int32")
        is_finite = ops.isfinite(ops.max(logits, axis=-1))
        next_token = ops.where(going, next_token, now.state.token)
        written = ops.where(going, ops.where(is_finite, next_token, NOT_FINITE), NO_TOKEN)
        tokens = ops.slice_update(tokens, (0, i), written[:, None])
        if with_logprobs:
            logprobs = ops.slice_update(logprobs, (0, i), logprob(logits, next_token)[:, None])
        stopped = ops.any(next_token[:, None] == now.stop_token_ids, axis=1)
        stopped = ops.logical_or(stopped, ops.logical_not(is_finite))
        new = now._replace(
            state=now.state.with_token(next_token),
            remaining=ops.where(stopped, 0, ops.maximum(now.remaining - 1, 0)),
            seen=ops.logical_or(now.seen, ops.arange(now.seen.shape[1]) == next_token[:, None]),
        )
        return new, tokens, logprobs

    step = next_logits(model)

    def one_step(i, leaves, tokens, logprobs):
        now = tree.pack_sequence_as(rows, leaves)
        logits, state = step(now.state, now.remaining > 0, i)
        found = add_token(i, logits, state.digest, now._replace(state=state), tokens, logprobs)
        return i + 1, tree.flatten(found[0]), *found[1:]

    def several_steps(i, leaves, tokens, logprobs):
        """Reads tokens into an open chunk, and writes the state once for all of them."""
        now = tree.pack_sequence_as(rows, leaves)
        chunk = model.backbone.open_chunk(b, steps_a_write)
        extend, commit = extending(model)

        def body(j, count, digest, chunk, leaves, tokens, logprobs):
            now = tree.pack_sequence_as(rows, leaves)
            logits, chunk = extend(now.state, chunk, j)
            count = count + ops.cast(now.remaining > 0, "int32")
            digest = digest_after(digest, now.state.token[:, None])
            found = add_token(i + j, logits, digest, now, tokens, logprobs)
            return j + 1, count, digest, chunk, tree.flatten(found[0]), *found[1:]

        def in_chunk(j, count, digest, chunk, leaves, tokens, logprobs):
            return ops.logical_and(j < steps_a_write, keep_going(i + j, leaves, tokens, logprobs))

        zero = ops.zeros((), "int32")
        loop_vars = (zero, ops.zeros((b,), "int32"), now.state.digest, chunk)
        loop_vars = ops.while_loop(in_chunk, body, (*loop_vars, leaves, tokens, logprobs))
        j, count, _, chunk, leaves, tokens, logprobs = loop_vars
        now = tree.pack_sequence_as(rows, leaves)
        now = now._replace(state=commit(now.state, chunk, count))
        return i + j, tree.flatten(now), tokens, logprobs

    start = ops.convert_to_tensor(0, "int32")
    # Flat, since loops of TensorFlow take only pytrees of its own kind.
    loop_vars = (start, tree.flatten(rows), tokens, logprobs)
    body = one_step if steps_a_write == 1 else several_steps
    _, leaves, tokens, logprobs = ops.while_loop(keep_going, body, loop_vars)
    return tree.pack_sequence_as(rows, leaves), tokens, logprobs


def default_steps_a_write(batch_size: int) -> int:
    """The `steps_a_write` that is fast on the platform. It changes results by rounding only."""
    if keras.config.backend() != "jax" or batch_size < MANY_ROWS:
        return 1
    return 1 if platform() == "cpu" else STEPS_A_WRITE


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
    """The model's log probabilities `(b)` of `token_ids` `(b)`, before the sampler's filters."""
    logprobs = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    return ops.take_along_axis(logprobs, token_ids[:, None], axis=-1)[:, 0]


def model_variables(model) -> list[keras.Variable]:
    """The variables that generation reads: all but those of the optimizer and the metrics."""
    return [*model.trainable_variables, *model.non_trainable_variables]
