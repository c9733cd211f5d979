"""The host's side of generation: prompts in, tokens out, run after run of a compiled loop."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm.auto
from keras import ops
from keras import tree

from keras_mamba2.generation.decode import Rows
from keras_mamba2.generation.decode import decode
from keras_mamba2.generation.prefill import BLOCK_SIZES
from keras_mamba2.generation.prefill import blocks
from keras_mamba2.generation.prefill import blocks_alone
from keras_mamba2.generation.prefill import prefill_block
from keras_mamba2.generation.prefill import prefill_row
from keras_mamba2.generation.programs import compiled
from keras_mamba2.generation.sampler import needs_history
from keras_mamba2.generation.sampler import picks_tokens
from keras_mamba2.generation.score import block_loss
from keras_mamba2.state import NO_TOKEN
from keras_mamba2.state import Mamba2State
from keras_mamba2.state.files import check_belongs

# The decode loop returns to the host after so many tokens, so one program serves any number.
DECODE_CAPACITY = 256
# Fewer stop tokens are filled up, so that their number is not compiled in.
STOP_TOKEN_CAPACITY = 8
# A prompt of more tokens has a progress bar.
LONG_PROMPT = 100_000


class Generator:
    """The compiled programs of one model and its sampler: KerasHub's `generate_function`.

    Args:
        model: a `Mamba2CausalLM` after `compile`.
    """

    def __init__(self, model):
        self.model = model

        def zeros(like):
            return model.backbone.initial_state(like.shape[0])

        def copy(state):
            return tree.map_structure(ops.copy, state)

        def prefill(state, token_ids, padding_mask):
            return prefill_block(model, state, token_ids, padding_mask)

        def prefill_one(state, row, token_ids):
            return prefill_row(model, state, row, token_ids)

        def loss(state, token_ids, targets, padding_mask):
            return block_loss(model, state, token_ids, targets, padding_mask)

        def decode_rows(rows, num_steps, stop_token_ids):
            return decode(
                model, model.sampler, Rows(*rows), num_steps, stop_token_ids, DECODE_CAPACITY
            )

        self._zeros = compiled(model, zeros)
        self._copy = compiled(model, copy)
        self._prefill_block = compiled(model, prefill, donate=True)
        self._prefill_row = compiled(model, prefill_one, donate=True)
        self._block_loss = compiled(model, loss, donate=True)
        self._decode = compiled(model, decode_rows, donate=True)
        self._search = compiled(model, model.generate_step, static=("stop_token_ids",))

    def __call__(
        self,
        inputs: Mapping[str, Any],
        stop_token_ids: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        state: Mamba2State | None = None,
        num_return_sequences: int = 1,
    ) -> dict[str, np.ndarray]:
        """Fills the padding of a batch of prompts with generated tokens.

        Args:
            inputs: `token_ids` and `padding_mask`, `(b max_length)`, padded on either side.
            stop_token_ids: token ids that end a row.
            max_new_tokens: int, ends a row too; by default the padding does.
            state: the `Mamba2State` that the prompts continue.
            num_return_sequences: int, how often each prompt is continued.

        Returns:
            The same two arrays, with so many rows for each prompt. Rows are padded on the right,
            whatever they were before.
        """
        prompts, limits = prompts_of(inputs)
        if max_new_tokens is not None:
            limits = np.minimum(limits, max_new_tokens)
        generate = self.generate if picks_tokens(self.model.sampler) else self.search
        rows = generate(prompts, limits, tuple(stop_token_ids or ()), state, num_return_sequences)

        prompts = [prompt for prompt in prompts for _ in range(num_return_sequences)]
        shape = (len(prompts), np.shape(inputs["token_ids"])[1])
        token_ids, padding_mask = np.zeros(shape, "int32"), np.zeros(shape, bool)
        for i, (prompt, new) in enumerate(zip(prompts, rows, strict=True)):
            length = len(prompt) + len(new)
            token_ids[i, :length] = np.concatenate([prompt, new])
            padding_mask[i, :length] = True
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    def prefill(self, prompts: list[np.ndarray], state: Mamba2State | None = None) -> Mamba2State:
        """The state after `prompts`, rows of token ids of any lengths, that continue `state`.

        The last token of each row waits in the state. `state` itself stays as it was.

        Raises:
            ValueError: for an empty batch, a row without any token, ids outside the vocabulary,
                and a state of another model or batch size.
        """
        self._check_prompts(prompts, state)
        if state is None:
            state = self._zeros(np.zeros(len(prompts), "int8"))
        else:
            waiting = ops.convert_to_numpy(state.token)
            prompts = [
                prompt if token == NO_TOKEN else np.concatenate([[token], prompt])
                for token, prompt in zip(waiting, prompts, strict=True)
            ]
            state = self._copy(state)  # what follows takes the memory of its argument
        state = self._feed(state, [np.asarray(prompt[:-1], "int32") for prompt in prompts])
        last = np.array([prompt[-1] for prompt in prompts], "int32")
        return state.with_token(last)

    def _feed(self, state: Mamba2State, prompts: list[np.ndarray]) -> Mamba2State:
        """The state after all tokens of `prompts`. The memory of `state` is given up."""
        longest = max(len(prompt) for prompt in prompts)
        bar = tqdm.auto.tqdm(total=longest, unit=" tokens", disable=longest <= LONG_PROMPT)
        counts = blocks_alone([len(prompt) for prompt in prompts])
        for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            cuts = np.arange(1, count + 1) * BLOCK_SIZES[0]
            *alone, prompts[i] = np.split(prompt, cuts)
            for piece in alone:
                state = self._prefill_row(state, np.array(i, "int32"), piece[None])
        for token_ids, padding_mask in blocks(prompts):
            state = self._prefill_block(state, token_ids, padding_mask)
            if not bar.disable:
                ops.convert_to_numpy(state.length)  # waits, so that the bar tells the truth
                bar.update(token_ids.shape[1])
        bar.close()
        return state

    def start(
        self,
        prompts: list[np.ndarray],
        limits: np.ndarray,
        state: Mamba2State | None = None,
        num_return_sequences: int = 1,
    ) -> Rows:
        """Where the rows stand before their first new token, of which `limits[i]` may come.

        From one prefill come `num_return_sequences` rows for each prompt, one after the other.
        """
        state = self.prefill(prompts, state)
        size = self.model.backbone.vocabulary_size if needs_history(self.model.sampler) else 0
        seen = np.zeros((len(prompts), size), bool)
        if size:
            for row, prompt in zip(seen, prompts, strict=True):
                row[prompt] = True
        rows = Rows(
            state=state,
            remaining=np.asarray(limits, "int32"),
            seen=seen,
        )
        n = num_return_sequences
        if n == 1:
            return rows
        return tree.map_structure(lambda leaf: ops.repeat(leaf, n, axis=0), rows)

    def advance(self, rows: Rows, num_steps: int, stop_token_ids: Sequence[int] = ()):
        """Runs the loop for at most `num_steps <= DECODE_CAPACITY` tokens a row.

        The memory of `rows` is given up. Returns the new rows, and the tokens
        `(b DECODE_CAPACITY)` with -1 where a row had stopped.
        """
        size = -(-max(len(stop_token_ids), 1) // STOP_TOKEN_CAPACITY) * STOP_TOKEN_CAPACITY
        stops = np.full(size, NO_TOKEN, "int32")
        stops[: len(stop_token_ids)] = stop_token_ids
        return self._decode(rows, np.array(num_steps, "int32"), stops)

    def decode(
        self, rows: Rows, stop_token_ids: Sequence[int] = (), run_lengths: Iterable[int] = ()
    ) -> "Decoding":
        """An iterator over what the rows get, until all have stopped."""
        return Decoding(self, rows, stop_token_ids, run_lengths)

    def generate(
        self,
        prompts: list[np.ndarray],
        limits: np.ndarray,
        stop_token_ids: Sequence[int],
        state: Mamba2State | None = None,
        num_return_sequences: int = 1,
    ) -> list[np.ndarray]:
        """The tokens that follow each prompt, at most `limits[i]` of them."""
        rows = self.start(prompts, limits, state, num_return_sequences)
        nothing = [np.zeros(0, "int32")] * rows.state.batch_size
        pieces = [nothing, *self.decode(rows, stop_token_ids)]
        return [np.concatenate(row) for row in zip(*pieces, strict=True)]

    def search(
        self,
        prompts: list[np.ndarray],
        limits: np.ndarray,
        stop_token_ids: tuple[int, ...],
        state: Mamba2State | None = None,
        num_return_sequences: int = 1,
    ) -> list[np.ndarray]:
        """As `generate`, for a sampler that searches with a loop of its own."""
        if state is not None or num_return_sequences > 1:
            raise ValueError(
                f"{type(self.model.sampler).__name__} searches with a loop of its own, which "
                "takes neither `state` nor `num_return_sequences`. Use a sampler that draws."
            )
        self._check_prompts(prompts, None)
        rows: list[np.ndarray] = [np.zeros(0, "int32")] * len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts])
        # Their loops begin at the shortest prompt, and weigh tokens that a longer one then
        # overrules. Among prompts of one length there is nothing to overrule.
        for length in np.unique(lengths):
            same = np.flatnonzero(lengths == length)
            group = np.stack([prompts[i] for i in same])
            found = self._search_group(group, limits[same], stop_token_ids)
            for i, new in zip(same, found, strict=True):
                rows[i] = new
        return rows

    def _search_group(
        self, prompts: np.ndarray, limits: np.ndarray, stop_token_ids: tuple[int, ...]
    ) -> list[np.ndarray]:
        length = prompts.shape[1]
        token_ids = np.pad(prompts, [(0, 0), (0, int(limits.max()))]).astype("int32")
        padding_mask = np.broadcast_to(np.arange(token_ids.shape[1]) < length, token_ids.shape)
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        found = self._search(inputs, stop_token_ids=stop_token_ids or None)
        rows = []
        for row, limit in zip(ops.convert_to_numpy(found["token_ids"]), limits, strict=True):
            new = row[length : length + limit]
            stops = np.flatnonzero(np.isin(new, stop_token_ids))
            rows.append(new[: stops[0] + 1] if len(stops) else new)
        return rows

    def loss(self, token_ids: np.ndarray) -> float:
        """The sum of the losses of all tokens after the first, the state carried along."""
        self._check_prompts([token_ids], None)
        state, total = self._zeros(np.zeros(1, "int8")), 0.0
        bar = tqdm.auto.tqdm(
            total=len(token_ids), unit=" tokens", disable=len(token_ids) <= LONG_PROMPT
        )
        pairs = zip(blocks([token_ids[:-1]]), blocks([token_ids[1:]]), strict=True)
        for (inputs, mask), (targets, _) in pairs:
            state, loss = self._block_loss(state, inputs, targets, mask)
            total += float(loss)
            bar.update(inputs.shape[1])
        bar.close()
        return total

    def _check_prompts(self, prompts: list[np.ndarray], state: Mamba2State | None) -> None:
        if not prompts:
            raise ValueError("There is nothing to generate from: the batch of prompts is empty.")
        has_token = np.zeros(len(prompts), bool)
        if state is not None:
            check_belongs(state, self.model.backbone)
            if state.batch_size != len(prompts):
                raise ValueError(
                    f"The state has {state.batch_size} rows, but there are {len(prompts)} "
                    "prompts. `state.repeat(n)` continues one text several times."
                )
            has_token = ops.convert_to_numpy(state.token) != NO_TOKEN
        size = self.model.backbone.vocabulary_size
        for i, prompt in enumerate(prompts):
            if not len(prompt) and not has_token[i]:
                raise ValueError(
                    f"Prompt {i} has no tokens. A prompt needs at least one: write some text, or "
                    "set `add_start_token=True` on the preprocessor."
                )
            if len(prompt) and (prompt.min() < 0 or prompt.max() >= size):
                bad = prompt[(prompt < 0) | (prompt >= size)][0]
                raise ValueError(
                    f"Prompt {i} has token id {bad}, outside the model's vocabulary of {size}."
                )


class Decoding:
    """A decode loop in progress. Iterating runs it on: new tokens of each row, until all stop.

    `rows` is where they stand, between runs.
    """

    def __init__(
        self,
        generator: Generator,
        rows: Rows,
        stop_token_ids: Sequence[int],
        run_lengths: Iterable[int] = (),
    ):
        self.generator = generator
        self.rows = rows
        self.stop_token_ids = stop_token_ids
        # In tokens; when they are used up, as many as fit.
        self._run_lengths = iter(run_lengths)

    def __iter__(self) -> "Decoding":
        return self

    def __next__(self) -> list[np.ndarray]:
        missing = int(ops.convert_to_numpy(self.rows.remaining).max())
        if missing <= 0:
            raise StopIteration
        num_steps = min(next(self._run_lengths, DECODE_CAPACITY), missing, DECODE_CAPACITY)
        self.rows, tokens = self.generator.advance(self.rows, num_steps, self.stop_token_ids)
        return [row[row != NO_TOKEN] for row in ops.convert_to_numpy(tokens)]

    def stop(self, row: int) -> None:
        """Lets no more tokens come in `row`."""
        remaining = np.array(ops.convert_to_numpy(self.rows.remaining))
        remaining[row] = 0
        self.rows = self.rows._replace(remaining=remaining)


def prompts_of(inputs: Mapping[str, Any]) -> tuple[list[np.ndarray], np.ndarray]:
    """The rows without their padding, and how many tokens fit behind each."""
    token_ids = np.asarray(ops.convert_to_numpy(inputs["token_ids"]))
    padding_mask = np.asarray(ops.convert_to_numpy(inputs["padding_mask"])).astype(bool)
    prompts = [row[mask] for row, mask in zip(token_ids, padding_mask, strict=True)]
    return prompts, token_ids.shape[1] - padding_mask.sum(axis=1)
