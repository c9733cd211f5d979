"""Speculative decoding: one `while_loop` in which a round reads the weights once for many tokens.

Each round a proposer guesses the next k tokens of each row. The model reads them in an open chunk
(`ops/open_chunk.py`), and the sampler picks a token after each, from the same probabilities and
with the same random numbers as without proposals. What it picks is the text; a proposal only
decides whether the pick after it counts. So the text is that of `decode`, up to rounding, whatever
is proposed, and the distribution is exactly the sampler's.

Reference:
    - [Leviathan et al., 2022](https://arxiv.org/abs/2211.17192)
    - [Daliri et al., 2024](https://arxiv.org/abs/2408.07978): with the same random numbers for
      draft and model, a draft at a distance d (total variation) is accepted with at least
      (1 - d) / (1 + d)
"""

from typing import Any
from typing import NamedTuple

from keras import ops
from keras import tree

from keras_mamba2.generation.decode import inside_loop
from keras_mamba2.generation.decode import logprob
from keras_mamba2.generation.decode import model_variables
from keras_mamba2.generation.picking import pick
from keras_mamba2.host.rows import NOT_FINITE
from keras_mamba2.host.rows import Rows
from keras_mamba2.state import NO_TOKEN
from keras_mamba2.state.digest import digest_after


class Outcome(NamedTuple):
    """How proposals fared in a run, over all rows."""

    accepted: Any  # int scalar
    rejected: Any  # int scalar; what follows a rejected one in its round does not count


def speculate(
    model,
    sampler,
    rows: Rows,
    proposer,
    num_tokens: int,
    num_rounds,
    capacity: int,
    with_logprobs: bool = False,
):
    """Picks up to `num_tokens + 1` tokens per row and round, until all rows have stopped.

    Args:
        model: a `Mamba2CausalLM`.
        sampler: as in `decode`.
        rows: `Rows`, whose `context` is the proposer's.
        proposer: a `Proposer`.
        num_tokens: int, k, how many tokens are proposed in a round.
        num_rounds: int scalar, how many rounds at most. A row may end with another number of
            tokens than another.
        capacity: int, the size of the result, at least k + 1. The run ends when a further round
            might not fit.
        with_logprobs: bool, as in `decode`.

    Returns:
        Tuple `(rows, tokens, logprobs, outcome)`, the first three as those of `decode`.
    """
    b = ops.shape(rows.remaining)[0]
    t = num_tokens + 1
    rows = rows._replace(state=model.backbone.in_loop(rows.state))
    one_round = inside_loop(
        [*model_variables(model), *proposer.variables],
        lambda now: _round(model, sampler, proposer, now, num_tokens),
    )
    tokens = ops.full((b, capacity), NO_TOKEN, dtype="int32")
    logprobs = ops.zeros((b, capacity if with_logprobs else 0), "float32")
    zero = ops.zeros((), "int32")
    loop_vars = (zero, rows, tokens, logprobs, ops.zeros((b,), "int32"), Outcome(zero, zero))

    def keep_going(i, rows, tokens, logprobs, length, outcome):
        going = ops.logical_and(i < num_rounds, ops.any(rows.remaining > 0))
        return ops.logical_and(going, ops.max(length) <= capacity - t)

    def body(i, rows, tokens, logprobs, length, outcome):
        rows, picked, logits, count, new = one_round(rows)
        tokens = append(tokens, picked, length, count)
        if with_logprobs:
            its = logprob(logits, ops.maximum(picked, 0))
            logprobs = append(logprobs, its, length, count)
        outcome = tree.map_structure(ops.add, outcome, new)
        return i + 1, rows, tokens, logprobs, length + count, outcome

    _, rows, tokens, logprobs, _, outcome = ops.while_loop(keep_going, body, loop_vars)
    rows = rows._replace(state=model.backbone.after_loop(rows.state))
    return rows, tokens, logprobs, outcome


def _round(model, sampler, proposer, rows: Rows, k: int):
    """One round: `(rows, picked, logits, count, outcome)`; the first `count` `(b)` picks count."""
    going, state = rows.remaining > 0, rows.state
    b = ops.shape(rows.remaining)[0]
    proposals, drafted = proposer.propose(rows, k, sampler, model.backbone.vocabulary_size)
    block = ops.concatenate([state.token[:, None], proposals], axis=1)  # (b t)
    chunk = model.backbone.open_chunk(b, k + 1)
    hidden_states, chunk = model.backbone.extend(block, state, chunk)
    logits = model.logits(hidden_states)  # (b t v)
    picked, is_finite = _picked(sampler, logits, rows, block)

    # A pick counts where all proposals before it were picked too, and the row goes on till there.
    agrees = ops.cumprod(ops.cast(picked[:, :-1] == proposals, "int32"), axis=1)
    accepted = ops.sum(agrees, axis=1)  # (b)
    index = ops.arange(k + 1, dtype="int32")
    stops = ops.any(picked[..., None] == rows.stop_token_ids[:, None], axis=-1)
    stops = ops.cast(ops.logical_or(stops, ops.logical_not(is_finite)), "int32")
    before = ops.cumsum(stops, axis=1) - stops
    counts = (index <= accepted[:, None]) & (before == 0) & (index < rows.remaining[:, None])
    count = ops.sum(ops.cast(counts, "int32"), axis=1)
    stopped = ops.any(ops.logical_and(counts, stops > 0), axis=1)

    last = ops.take_along_axis(picked, ops.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    state = model.backbone.commit(state, chunk, count)
    new = rows._replace(
        state=state.with_token(ops.where(going, last, state.token)),
        remaining=ops.where(stopped, 0, rows.remaining - count),
        seen=_seen(rows.seen, picked, counts),
        context=proposer.accept(drafted, picked, count),
    )
    written = ops.where(is_finite, picked, NOT_FINITE)
    # Proposals behind the end of a text say nothing about the proposer.
    looked_at = ops.where(going, ops.minimum(count, k), 0)
    right = ops.minimum(accepted, looked_at)
    outcome = Outcome(ops.sum(right), ops.sum(looked_at - right))
    return new, written, logits, count, outcome


def _picked(sampler, logits, rows: Rows, block):
    """The picks `(b t)` after each token of `block` `(b t)`, and whether its logits are finite."""
    b, t, v = logits.shape
    digests, digest = [], rows.state.digest
    for i in range(t):
        digest = digest_after(digest, block[:, i : i + 1])
        digests.append(digest)
    seen = [rows.seen]
    for i in range(1, t):
        seen.append(_seen(seen[-1], block[:, i : i + 1]))

    def each(leaf):
        return ops.repeat(leaf, t, axis=0)

    flat = rows._replace(
        state=(),
        context=(),
        remaining=each(rows.remaining),
        stop_token_ids=(),
        seen=ops.reshape(ops.stack(seen, axis=1), (b * t, -1)),
        keys=each(rows.keys),
        sampling=tree.map_structure(each, rows.sampling),
    )
    logits = ops.reshape(logits, (b * t, v))
    picked = pick(sampler, logits, flat, ops.reshape(ops.stack(digests, axis=1), (-1,)))
    is_finite = ops.isfinite(ops.max(logits, axis=-1))
    return ops.reshape(ops.cast(picked, "int32"), (b, t)), ops.reshape(is_finite, (b, t))


def _seen(seen, ids, counts=None):
    """`seen` `(b v)` with `ids` `(b t)`, of those that count; `(b 0)` stays."""
    if not seen.shape[1]:
        return seen
    found = ops.arange(seen.shape[1]) == ids[..., None]  # (b t v)
    if counts is not None:
        found = ops.logical_and(found, counts[..., None])
    return ops.logical_or(seen, ops.any(found, axis=1))


def append(array, new, length, count):
    """`array` `(b c)` with the first `count` `(b)` of `new` `(b t)` after `length` `(b)`."""
    index = ops.arange(array.shape[1], dtype="int32") - length[:, None]
    moved = ops.take_along_axis(new, ops.clip(index, 0, new.shape[1] - 1), axis=1)
    return ops.where((index >= 0) & (index < count[:, None]), moved, array)
