"""Who guesses the next tokens for speculative decoding (`speculate.py`)."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import instance
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import optional
from keras_mamba2.generation.decode import model_variables
from keras_mamba2.generation.picking import pick
from keras_mamba2.generation.picking import picks_tokens
from keras_mamba2.generation.speculate import append
from keras_mamba2.host.room import room_for
from keras_mamba2.host.rows import Rows
from keras_mamba2.models.weights_read import bytes_read
from keras_mamba2.state.digest import digest_after

# More rows than this in one product cost as much as several products.
MOST_TOKENS = 63
# Tokens of a text that there is room for at first: each other room is a program.
LEAST_TEXT = 4096


class Proposer:
    """The base class of those that propose tokens.

    What it knows of the text of each row is its context, a pytree with batch-first leaves, which
    goes through the compiled loop with the row. A wrong context costs time, and changes no token.

    Args:
        num_tokens: int, k, how many tokens are proposed at once. `None` to follow how many are
            accepted, down to none at all where proposals do not pay.
    """

    def __init__(self, num_tokens: int | None = None):
        self.num_tokens = num_tokens
        check_attributes(self, num_tokens=optional(integer(at_least=1, at_most=MOST_TOKENS)))

    @property
    def variables(self) -> list[keras.Variable]:
        """What `propose` reads."""
        return []

    def cost(self, model, batch_size: int) -> float:
        """What a proposed token of each row costs, in steps of `model`."""
        return 0.0

    def check(self, model) -> None:
        """Raises if it cannot propose tokens to `model`."""

    def empty(self, batch_size: int) -> Any:
        """The context before any token."""
        raise NotImplementedError

    def start(self, texts: Sequence[np.ndarray]) -> Any:
        """The context after `texts`, rows of token ids. The last of each is not read yet."""
        raise NotImplementedError

    def read(self, context: Any, new: Sequence[np.ndarray]) -> Any:
        """The context after more tokens, which were made without it."""
        raise NotImplementedError

    def with_room(self, context: Any, num_tokens: int) -> Any:
        """The context with room for `num_tokens` more in each row."""
        raise NotImplementedError

    # In the compiled loop.

    def propose(self, rows: Rows, k: int, sampler, vocabulary_size: int) -> tuple[Any, Any]:
        """Returns proposals `(b k)`, ids below `vocabulary_size`, and what `accept` needs."""
        raise NotImplementedError

    def accept(self, drafted: Any, tokens: Any, count: Any) -> Any:
        """The context after the first `count` `(b)` of `tokens` `(b t)` were added to the text."""
        raise NotImplementedError


class Text(NamedTuple):
    """All tokens of each row."""

    token_ids: Any  # int32 (b c), with room for c
    length: Any  # int32 (b)


class PromptLookup(Proposer):
    """Proposes what followed the last time that the text was as it is now.

    The longest end of the text that occurred before is looked for, of at most `max_ngram` tokens,
    and what followed its last occurrence is proposed. It needs no second model. It pays for text
    that repeats its prompt or itself: summaries, code, editing, extraction.

    Args:
        num_tokens: int, how many tokens are proposed at once. `None` to follow how many are
            accepted.
        max_ngram: int, how many tokens are compared at most.

    Example:
    ```python
    lm.compile(sampler="greedy", speculation=keras_mamba2.PromptLookup())
    lm.generate(article + "Summary:")
    ```

    Reference:
        - [Saxena, 2023](https://github.com/apoorvumang/prompt-lookup-decoding)
    """

    def __init__(self, num_tokens: int | None = None, max_ngram: int = 3):
        super().__init__(num_tokens)
        self.max_ngram = max_ngram
        check_attributes(self, max_ngram=SIZE)

    def empty(self, batch_size: int) -> Text:
        return _text([np.zeros(0, "int32")] * batch_size, 0)

    def start(self, texts: Sequence[np.ndarray]) -> Text:
        return _text(texts, max(map(len, texts)))

    def read(self, context: Text, new: Sequence[np.ndarray]) -> Text:
        old = zip(*map(ops.convert_to_numpy, context), new, strict=True)
        return self.start([np.concatenate([row[:n], more]) for row, n, more in old])

    def with_room(self, context: Text, num_tokens: int) -> Text:
        needed = int(ops.convert_to_numpy(context.length).max()) + num_tokens
        width = max(_room(needed) - context.token_ids.shape[1], 0)
        return context._replace(token_ids=ops.pad(context.token_ids, [(0, 0), (0, width)]))

    def propose(self, rows: Rows, k: int, sampler, vocabulary_size: int) -> tuple[Any, Text]:
        token_ids, length = rows.context
        place = self._place(token_ids, length)
        # What follows it, again and again where the text ends: it may be a repetition already.
        period = ops.maximum(length[:, None] - 1 - place, 1)
        index = place + 1 + ops.arange(k, dtype="int32") % period
        index = ops.clip(index, 0, token_ids.shape[1] - 1)
        return ops.take_along_axis(token_ids, index, axis=1), rows.context

    def _place(self, token_ids, length):
        """Where the longest end of the text that occurred before ended there, `(b 1)`."""
        c = token_ids.shape[1]
        is_equal, run = ops.ones(token_ids.shape, "int32"), ops.zeros(token_ids.shape, "int32")
        for i in range(min(self.max_ngram, c)):
            end = length[:, None] - 1 - i  # (b 1)
            wanted = ops.take_along_axis(token_ids, ops.maximum(end, 0), axis=1)
            shifted = ops.pad(token_ids, [(0, 0), (i, 0)], constant_values=-1)[:, :c]
            is_equal = is_equal * ops.cast((shifted == wanted) & (end >= 0), "int32")
            run = run + is_equal
        place = ops.arange(c, dtype="int32")
        run = ops.where(place < length[:, None] - 1, run, -1)
        longest = ops.max(run, axis=1, keepdims=True)
        last = ops.max(ops.where(run == longest, place, 0), axis=1, keepdims=True)
        # Nothing occurred before: the last token is proposed again.
        return ops.where(longest > 0, last, length[:, None] - 2)

    def accept(self, drafted: Text, tokens: Any, count: Any) -> Text:
        token_ids, length = drafted
        return Text(append(token_ids, tokens, length, count), length + count)


class DraftModel(Proposer):
    """A smaller model that proposes what it would write itself.

    It picks tokens as the model does, with the same sampler and the same random numbers, so that
    they agree as often as their probabilities allow.

    Args:
        model: a `keras_mamba2.Mamba2CausalLM` with the same tokenizer. Its own sampler is not
            used.
        num_tokens: int, how many tokens are proposed at once. `None` to follow how many are
            accepted.

    Example:
    ```python
    lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_2.7b_en")
    draft = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_130m_en")
    lm.compile(sampler="greedy", speculation=keras_mamba2.DraftModel(draft))
    ```

    Reference:
        - [Leviathan et al., 2022](https://arxiv.org/abs/2211.17192)
    """

    def __init__(self, model, num_tokens: int | None = None):
        super().__init__(num_tokens)
        self.model = instance(keras.Model, "a `keras_mamba2.Mamba2CausalLM`")("model", model)
        if not hasattr(model, "make_generate_function") or not hasattr(model.backbone, "extend"):
            raise ValueError(
                f"`model` must be a `keras_mamba2.Mamba2CausalLM`. Received: {type(model).__name__}"
            )

    @property
    def variables(self) -> list[keras.Variable]:
        return model_variables(self.model)

    def cost(self, model, batch_size: int) -> float:
        draft, step = (bytes_read(lm.backbone, batch_size) for lm in (self.model, model))
        return draft / step

    def check(self, model) -> None:
        ours, theirs = self.model.preprocessor, model.preprocessor
        if ours is None or theirs is None:
            return
        difference = _first_difference(ours.tokenizer, theirs.tokenizer)
        if difference:
            raise ValueError(
                "The draft model must have the tokenizer of the model. The first difference: "
                f"{difference}"
            )

    def empty(self, batch_size: int) -> Any:
        return self.model.backbone.initial_state(batch_size)

    def start(self, texts: Sequence[np.ndarray]) -> Any:
        return self._generator.prefill([self._known(text) for text in texts])

    def read(self, context: Any, new: Sequence[np.ndarray]) -> Any:
        if not any(map(len, new)):
            return context
        return self._generator.prefill([self._known(text) for text in new], context)

    def with_room(self, context: Any, num_tokens: int) -> Any:
        return self._generator.with_room(context, num_tokens)

    @property
    def _generator(self):
        return self.model.make_generate_function()

    def _known(self, token_ids):
        """Ids that only the other model has are the last one: any id would be as wrong."""
        return np.minimum(token_ids, self.model.backbone.vocabulary_size - 1)

    def propose(self, rows: Rows, k: int, sampler, vocabulary_size: int) -> tuple[Any, Any]:
        backbone, context = self.model.backbone, rows.context
        b = rows.remaining.shape[0]
        chunk = backbone.open_chunk(b, k + 1)
        proposals = ops.zeros((b, k + 1), "int32")

        def body(i, token, digest, seen, chunk, proposals):
            known = ops.minimum(token, backbone.vocabulary_size - 1)
            hidden_states, chunk = backbone.extend(known[:, None], context, chunk, i)
            logits = _with_ids(self.model.logits(hidden_states[:, 0]), vocabulary_size)
            digest = digest_after(digest, token[:, None])
            token = pick(sampler, logits, rows._replace(seen=seen), digest)
            token = ops.cast(token, "int32")
            if seen.shape[1]:
                seen = ops.logical_or(seen, ops.arange(seen.shape[1]) == token[:, None])
            proposals = ops.slice_update(proposals, (0, i), token[:, None])
            return i + 1, token, digest, seen, chunk, proposals

        # Once more than there are proposals, so that the last one is in the chunk too.
        state = rows.state
        start = ops.zeros((), "int32")
        loop_vars = (start, state.token, state.digest, rows.seen, chunk, proposals)
        *_, chunk, proposals = ops.while_loop(lambda i, *_: i <= k, body, loop_vars)
        return proposals[:, :k], (context, chunk)

    def accept(self, drafted: Any, tokens: Any, count: Any) -> Any:
        context, chunk = drafted
        last = ops.take_along_axis(tokens, ops.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        last = ops.clip(last, 0, self.model.backbone.vocabulary_size - 1)
        token = ops.where(count > 0, last, context.token)
        return self.model.backbone.commit(context, chunk, count).with_token(token)


def check_speculation(speculation: Proposer | None, sampler, model) -> None:
    """Raises if `speculation` cannot propose tokens to `model` with `sampler`."""
    PROPOSER("speculation", speculation)
    if speculation is None:
        return
    if keras.config.backend() != "jax":
        raise ValueError(
            "`speculation` needs the JAX backend. Set KERAS_BACKEND=jax, or compile without it. "
            f"The backend is {keras.config.backend()}"
        )
    if not picks_tokens(sampler):
        raise ValueError(
            f"{type(sampler).__name__} searches whole texts, and gives no probabilities of a next "
            "token. Compile with a sampler that draws, or without `speculation`."
        )
    speculation.check(model)


PROPOSER = optional(
    instance(Proposer, "a `keras_mamba2.PromptLookup`, a `keras_mamba2.DraftModel`")
)


def _room(num_tokens: int) -> int:
    return max(room_for(num_tokens), LEAST_TEXT)


def _text(rows: Sequence[np.ndarray], longest: int) -> Text:
    token_ids = np.zeros((len(rows), _room(longest)), "int32")
    for row, text in zip(token_ids, rows, strict=True):
        row[: len(text)] = text
    return Text(token_ids, np.array([len(row) for row in rows], "int32"))


def _with_ids(logits, v: int):
    """Logits `(b w)` as `(b v)`: what has no place is left out, what is missing never comes."""
    w = logits.shape[-1]
    if w >= v:
        return logits[:, :v]
    return ops.pad(logits, [(0, 0), (0, v - w)], constant_values=-1e9)


def _first_difference(ours, theirs) -> str | None:
    """The first id that stands for something else in two tokenizers."""
    tokens = [{id: token for token, id in t.get_vocabulary().items()} for t in (ours, theirs)]
    for token_id in range(min(ours.num_ids, theirs.num_ids)):
        here, there = (of.get(token_id) for of in tokens)
        if here != there:
            return f"token {token_id} is {here!r} in the draft model and {there!r} here"
    return None
