"""The host's side of generation: prompts in, tokens out, run after run of a compiled loop."""

import concurrent.futures
import functools
import itertools
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm.auto
from keras import ops
from keras import tree

from keras_mamba2.generation.decode import decode
from keras_mamba2.generation.decode import default_steps_a_write
from keras_mamba2.generation.picking import needs_history
from keras_mamba2.generation.picking import picks_tokens
from keras_mamba2.generation.picking import run_seed
from keras_mamba2.generation.picking import sampling_of
from keras_mamba2.generation.prefill import default_block_sizes
from keras_mamba2.generation.prefill import prefill_block
from keras_mamba2.generation.prefill import prefill_row
from keras_mamba2.generation.programs import compiled
from keras_mamba2.generation.programs import prepare
from keras_mamba2.generation.rows import put
from keras_mamba2.generation.rows import select
from keras_mamba2.generation.sampler import FilterSampler
from keras_mamba2.generation.score import block_logprobs
from keras_mamba2.generation.score import block_loss
from keras_mamba2.generation.search import search
from keras_mamba2.generation.speculate import speculate
from keras_mamba2.generation.speculative_decoding import SpeculativeDecoding
from keras_mamba2.generation.speculative_decoding import choices_of
from keras_mamba2.host.blocks import BLOCK_SIZES
from keras_mamba2.host.blocks import LONG_PROMPT
from keras_mamba2.host.blocks import block_sizes
from keras_mamba2.host.blocks import blocks
from keras_mamba2.host.blocks import feed
from keras_mamba2.host.decoding import NOT_FINITE_REASON
from keras_mamba2.host.decoding import Decoding
from keras_mamba2.host.keys import row_keys
from keras_mamba2.host.keys import row_texts
from keras_mamba2.host.prompts import after_tokens
from keras_mamba2.host.prompts import check_prompts
from keras_mamba2.host.prompts import padded
from keras_mamba2.host.prompts import rows_of
from keras_mamba2.host.prompts import seen_ids
from keras_mamba2.host.room import room_for
from keras_mamba2.host.rows import DECODE_CAPACITY
from keras_mamba2.host.rows import Rows
from keras_mamba2.host.rows import stop_tokens
from keras_mamba2.host.sampling import Sampling
from keras_mamba2.state import Mamba2State
from keras_mamba2.state.files import check_belongs
from keras_mamba2.state.host import with_room_on_host
from keras_mamba2.state.room import needs_room
from keras_mamba2.state.room import room_of
from keras_mamba2.state.room import with_room

# A prompt is scored in these blocks: the logits of a longer one would take much memory.
SCORING_SIZES = BLOCK_SIZES[1:]
MOST_TOKENS = np.iinfo("int32").max
# A search holds whole rows in memory: the prompt and all tokens that may follow.
MOST_SEARCHED = 1_000_000


class Generator:
    """The compiled programs of one model and its sampler: KerasHub's `generate_function`.

    The sampler and who proposes tokens are those that the model has been compiled with, also for
    a stream that goes on while it is compiled anew.

    Args:
        model: a `Mamba2CausalLM` after `compile`.
        steps_a_write: int, after how many steps of decoding the state is written. `None` for what
            is fast on the platform.
    """

    # For `Decoding`.
    to_numpy = staticmethod(ops.convert_to_numpy)
    decode_capacity = DECODE_CAPACITY
    # Of the blocks that prompts are read in; `None` for what is fast on the platform.
    block_sizes: tuple[int, ...] | None = None

    def __init__(self, model, steps_a_write: int | None = None):
        self.model, self.sampler, self.speculation = model, model.sampler, model.speculation
        # For `SpeculativeDecoding`, by the number of rows: to count weights takes milliseconds.
        self.costs_of_rounds: dict[int, tuple[dict[int, float], float]] = {}
        # Of programs that are compiled while the caller goes on.
        self.compiling: list[concurrent.futures.Future] = []

        def zeros(like, room=None):
            return model.backbone.initial_state(like.shape[0], room)

        def grow(state, room):
            return with_room(state, model.backbone, room)

        def copy(state):
            return tree.map_structure(ops.copy, state)

        def prefill(state, token_ids, padding_mask):
            return prefill_block(model, state, token_ids, padding_mask)

        def prefill_one(state, row, token_ids):
            return prefill_row(model, state, row, token_ids)

        def loss(state, token_ids, targets, padding_mask):
            return block_loss(model, state, token_ids, targets, padding_mask)

        def logprobs(state, token_ids, targets, padding_mask, num_likely):
            return block_logprobs(model, state, token_ids, targets, padding_mask, num_likely)

        # For rows with their own sampling parameters, whatever the model's sampler is.
        sampler, proposer = self.sampler, self.speculation
        self._filters = sampler if isinstance(sampler, FilterSampler) else FilterSampler()

        def decode_rows(rows, num_steps, asked=None, with_logprobs=False, num_likely=0):
            rows = Rows(*rows)
            picking = self._filters if rows.sampling else sampler
            steps = steps_a_write or default_steps_a_write(rows.remaining.shape[0])
            arguments = num_steps, DECODE_CAPACITY, with_logprobs, steps, num_likely, asked
            return decode(model, picking, rows, *arguments)

        def speculate_rows(rows, num_rounds, num_tokens=1, with_logprobs=False):
            rows = Rows(*rows)
            picking = self._filters if rows.sampling else sampler
            arguments = proposer, num_tokens, num_rounds, DECODE_CAPACITY, with_logprobs
            return speculate(model, picking, rows, *arguments)

        def search_rows(token_ids, padding_mask, stop_token_ids):
            return search(model, sampler, token_ids, padding_mask, stop_token_ids)

        self._needs_room = needs_room(model.backbone)
        self._zeros = compiled(model, zeros, static=("room",))
        self._grow = compiled(model, grow, static=("room",))
        self._copy = compiled(model, copy)
        self._prefill_block = compiled(model, prefill, donate=True)
        self._prefill_row = compiled(model, prefill_one, donate=True)
        self._block_loss = compiled(model, loss, donate=True)
        self._block_logprobs = compiled(model, logprobs, donate=True, static=("num_likely",))
        self._decode = compiled(
            model, decode_rows, donate=True, static=("with_logprobs", "num_likely")
        )
        self._speculate = compiled(
            model,
            speculate_rows,
            donate=True,
            static=("num_tokens", "with_logprobs"),
            read=lambda: proposer.variables,
        )
        self._put = compiled(model, put, donate=True)
        self._select = compiled(model, select)
        self._search = compiled(
            model, search_rows, static=("stop_token_ids",), assigned=sampler.variables
        )

    def __call__(
        self, inputs: Mapping[str, Any], stop_token_ids: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Fills the padding of a batch of prompts with generated tokens.

        Args:
            inputs: `token_ids` and `padding_mask`, `(b max_length)`, padded on either side.
            stop_token_ids: token ids that end a row.

        Returns:
            The same two arrays. Rows are padded on the right, whatever they were before.
        """
        prompts, limits = prompts_of(inputs)
        new = self.generate(prompts, limits, tuple(stop_token_ids or ()))
        rows = [np.concatenate(pair) for pair in zip(prompts, new, strict=True)]
        return padded(rows, np.shape(inputs["token_ids"])[1])

    def wait(self) -> None:
        """Until nothing is compiled any more: a call would compile the same program once more."""
        try:
            for compiling in list(self.compiling):
                compiling.result()
        finally:
            self.compiling.clear()

    def prefill(self, prompts: list[np.ndarray], state: Mamba2State | None = None) -> Mamba2State:
        """The state after `prompts`, rows of token ids of any lengths, that continue `state`.

        The layers have not read the last token of each row: it is the new state's `token`. The
        given `state` stays as it was.

        Raises:
            ValueError: for an empty batch, a row without any token, ids outside the vocabulary,
                and a state of another model or batch size.
        """
        self._check_prompts(prompts, state)
        if state is None:
            state = self.empty_state(max(map(len, prompts)), len(prompts))
        else:
            prompts = after_tokens(ops.convert_to_numpy(state.token), prompts)
            state = self._copy(state)  # the programs below reuse the memory of their argument
            state = self.with_room(state, [len(prompt) for prompt in prompts])
        state = self._feed(state, [np.asarray(prompt[:-1], "int32") for prompt in prompts])
        last = np.array([prompt[-1] for prompt in prompts], "int32")
        return state.with_token(last)

    def _room(self, num_tokens: int) -> dict[str, int]:
        """The room of a new state for so many tokens, if it needs room."""
        return {"room": room_for(num_tokens)} if self._needs_room else {}

    def with_room(self, state: Mamba2State, num_tokens: int | Sequence[int]) -> Mamba2State:
        """`state` with room for `num_tokens` more in each row."""
        if not self._needs_room:
            return state
        needed = int(np.max(ops.convert_to_numpy(state.length) + np.asarray(num_tokens)))
        if needed <= room_of(state, self.model.backbone):
            return state
        return self._grow(state, room=room_for(needed))

    def _feed(self, state: Mamba2State, prompts: list[np.ndarray]) -> Mamba2State:
        """The state after all tokens of `prompts`. `state` cannot be used any more."""
        sizes = self._block_sizes(len(prompts))
        return feed(state, prompts, self._prefill_block, self._prefill_row, sizes)

    def _block_sizes(self, batch_size: int) -> tuple[int, ...]:
        return self.block_sizes or default_block_sizes(batch_size)

    def start(
        self,
        prompts: list[np.ndarray],
        limits: np.ndarray,
        stop_token_ids: Sequence[int] = (),
        state: Mamba2State | None = None,
        num_return_sequences: int = 1,
        seed: int | None = None,
        history: Sequence[np.ndarray] | None = None,
        after: Mamba2State | None = None,
        **parameters: float | None,
    ) -> Rows:
        """The rows before their first new token. Row `i` may get `limits[i]` tokens.

        A prompt is prefilled once, and gives `num_return_sequences` rows, one after the other.

        Args:
            prompts: rows of token ids, of any lengths.
            limits: int array `(b)`.
            stop_token_ids: token ids that end a row.
            state: the `Mamba2State` that the prompts continue.
            num_return_sequences: int, how often each prompt is continued.
            seed: int, for the random numbers. `None` takes one from the sampler's generator.
            history: for each prompt the token ids before it, which the state has seen, so that a
                penalty on repetition applies to them.
            after: the `Mamba2State` after the prompts, where it is known.
            **parameters: of `FilterSampler`, instead of those of the model's sampler.
        """
        n = num_return_sequences
        b = len(prompts) * n
        sampling = sampling_of(self.sampler, b, **parameters)
        sampler = self._filters if sampling else self.sampler
        penalizes = sampling and (sampling.repetition_penalty != 1).any()
        size = self.model.backbone.vocabulary_size
        size = size if penalizes or (not sampling and needs_history(sampler)) else 0
        after = self.prefill(prompts, state) if after is None else after
        read = prompts
        if state is not None:
            read = after_tokens(ops.convert_to_numpy(state.token), prompts)
        seen = seen_ids(read, size)
        if size and history:
            seen |= seen_ids(history, size)
        context = self._context(prompts, after, history)
        before = () if state is None else map(ops.convert_to_numpy, (state.digest, state.token))
        texts = [text for text in row_texts(prompts, *before) for _ in range(n)]
        generators = sampler.variables
        return Rows(
            state=after if n == 1 else after.repeat(n),
            remaining=np.repeat(np.minimum(limits, MOST_TOKENS).astype("int32"), n),
            stop_token_ids=stop_tokens(stop_token_ids, b),
            seen=np.repeat(seen, n, axis=0),
            keys=row_keys(
                # Of the sampler's own generator, if it has one, also where filters draw for it.
                run_seed(self.sampler if self.sampler.variables else sampler)
                if seed is None
                else seed,
                texts,
                len(generators),
                generators[0].dtype if generators else "int32",
            ),
            sampling=sampling,
            context=tree.map_structure(lambda leaf: ops.repeat(leaf, n, axis=0), context),
        )

    def _context(self, prompts, state: Mamba2State, history) -> Any:
        """What the proposer of tokens, if there is one, knows of the texts before the first token.

        Of a text that a state stands for it knows what `history` says, or nothing but the last
        token.
        """
        if self.speculation is None:
            return ()
        texts = prompts
        if history is not None:
            texts = [np.concatenate(pair) for pair in zip(history, prompts, strict=True)]
        last = ops.convert_to_numpy(state.token)
        return self.speculation.start(
            [
                text if len(text) and text[-1] == token else np.append(text, token)
                for text, token in zip(texts, last, strict=True)
            ]
        )

    def empty_state(self, num_tokens: int, batch_size: int = 1) -> Mamba2State:
        """The state of rows that have read nothing, with room for `num_tokens` in each."""
        return self._zeros(np.zeros(batch_size, "int8"), **self._room(num_tokens))

    def copied(self, state: Mamba2State) -> Mamba2State:
        """`state` in memory of its own, which no program that goes on from the first reuses."""
        return self._copy(state)

    def restored(self, state: Mamba2State, num_tokens: int) -> Mamba2State:
        """A copy on the device of a state of `state.host.on_host`, as `empty_state` has room."""
        if self._needs_room:
            state = with_room_on_host(state, self.model.backbone, room_for(num_tokens))
        return self._copy(state)

    def read(self, state: Mamba2State, token_ids: np.ndarray) -> Mamba2State:
        """The state of one row after `token_ids`, all of them. `state` cannot be used any more.

        A long prompt may be read in pieces, with other work between them.
        """
        state = self._feed(state, [token_ids])
        ops.convert_to_numpy(state.length)  # waits for the device
        return state

    def read_scoring(
        self, state: Mamba2State, token_ids: np.ndarray, targets: np.ndarray, num_likely: int
    ) -> tuple[Mamba2State, np.ndarray, np.ndarray, np.ndarray]:
        """As `read`, and how likely the model found each of `targets` after its token.

        Returns:
            The state; the log probabilities `(n)` of the targets; and of the `num_likely` likeliest
            tokens in their places the ids and the log probabilities, `(n k)` both.
        """
        found = []
        pairs = zip(
            blocks([token_ids], SCORING_SIZES), blocks([targets], SCORING_SIZES), strict=True
        )
        for (inputs, mask), (outputs, _) in pairs:
            state, logprobs, likely = self._block_logprobs(
                state, inputs, outputs, mask, num_likely=num_likely
            )
            arrays = (logprobs, likely.token_ids, likely.logprobs)
            found.append([ops.convert_to_numpy(array)[0][mask[0]] for array in arrays])
        logprobs, top_ids, top_logprobs = map(np.concatenate, zip(*found, strict=True))
        return state, logprobs, top_ids, top_logprobs

    def sequences(
        self,
        state: Mamba2State,
        prompt: np.ndarray,
        limit: int,
        stop_token_ids: Sequence[int] = (),
        count: int = 1,
        seed: int = 0,
        first: int = 0,
        **parameters: Any,
    ) -> list[Rows]:
        """`count` rows, each for `insert`, that continue `prompt` from one `state`.

        They get the tokens that rows of `start` get. Their arrays have the same shapes whatever
        the arguments are, so that all can take any place in one loop.

        Args:
            state: the `Mamba2State` of one row after all of the prompt but its last token.
            prompt: token ids, all of them.
            limit: int, how many tokens a row may get.
            stop_token_ids: as in `start`, at most `STOP_TOKEN_CAPACITY`.
            count: int, the number of sequences.
            seed: int, as there.
            first: int, how many sequences of the same prompt and seed came before these.
            **parameters: of `FilterSampler`, whatever the model's sampler is.
        """
        row = Rows(
            state=state.with_token(np.array(prompt[-1:], "int32")),
            remaining=np.array([limit], "int32"),
            stop_token_ids=stop_tokens(stop_token_ids, 1),
            seen=seen_ids([prompt], self.model.backbone.vocabulary_size),
            keys=(),
            sampling=Sampling.of_rows(1, **parameters),
        )
        generators = self._filters.variables
        keys = row_keys(seed, [()] * (first + count), len(generators), generators[0].dtype)
        return [row._replace(keys=keys[i : i + 1]) for i in range(first, first + count)]

    def select(self, rows: Any, indices: Sequence[int]) -> Any:
        """The rows at `indices`, of `Rows` or of a state. The given ones stay as they were."""
        return self._select(rows, np.array(indices, "int32"))

    def insert(self, rows: Rows, index: int, row: Rows) -> Rows:
        """`rows` with `row`, a batch of one, at `index`. The given `rows` cannot be used any more.

        The other rows do not change. `row` comes from `start` with the same sampler. The row at
        `index` is overwritten: it should have no tokens remaining. Nothing is proposed to rows of
        several texts: they lose their context.
        """
        rows, row = rows._replace(context=()), row._replace(context=())
        backbone = self.model.backbone
        if self._needs_room and room_of(rows.state, backbone) != room_of(row.state, backbone):
            room = max(room_of(state, backbone) for state in (rows.state, row.state))
            rows = rows._replace(state=self._grow(rows.state, room=room))
            row = row._replace(state=self._grow(row.state, room=room))
        return Rows(*self._put(rows, np.array(index, "int32"), row))

    def programs_for(
        self, batch_size: int, prompt_lengths: Sequence[int]
    ) -> list[Callable[[], None]]:
        """Functions each of which compiles one program that prompts of these lengths need.

        They may be called from several threads. On JAX the weights need not be there yet, unless
        tokens are proposed.
        """
        like = np.zeros(batch_size, "int8")
        # One length for each room.
        rooms = {tuple(self._room(n).items()): n for n in prompt_lengths}.values()
        of_blocks = self._block_sizes(batch_size)
        sizes = {size for n in prompt_lengths for size in block_sizes(n - 1, of_blocks)}

        def rows_after(state: Mamba2State, length: int) -> Rows:
            prompts, limits = [np.zeros(length, "int32")] * batch_size, np.ones(batch_size)
            state = state.with_token(np.zeros(batch_size, "int32"))
            return self.start(prompts, limits, seed=0, after=state)

        def prefill(length: int, size: int) -> None:
            block = np.zeros((batch_size, size), "int32"), np.ones((batch_size, size), bool)
            state = prepare(self._zeros, like, **self._room(length))
            prepare(self._prefill_block, state, *block)

        def decode(length: int) -> None:
            # Without a context, of which it needs none: of one token it is soon made.
            rows = rows_after(prepare(self._zeros, like, **self._room(length)), 1)
            rows = rows._replace(context=())
            prepare(self._decode, rows, np.array(1, "int32"), with_logprobs=False)

        def propose(length: int, num_tokens: int) -> None:
            # Run, and so the proposer's own programs are compiled too.
            self.speculate(rows_after(self.empty_state(length, batch_size), length), 1, num_tokens)

        tasks: list[Callable[[], None]] = [functools.partial(decode, n) for n in rooms]
        tasks += [
            functools.partial(prefill, n, size) for n in rooms for size in sorted(sizes)[::-1]
        ]
        if self.speculation is not None:
            choices = choices_of(self.speculation)
            tasks += [functools.partial(propose, n, k) for n in prompt_lengths for k in choices]
        return tasks

    def advance(self, rows: Rows, num_steps: int, with_logprobs: bool = False):
        """Runs the loop for at most `num_steps <= DECODE_CAPACITY` tokens a row.

        The given `rows` cannot be used any more. Returns the new rows; the tokens
        `(b DECODE_CAPACITY)`, with -1 after a row has stopped, -2 where its logits are not
        finite; and log probabilities of the same shape, if asked for.
        """
        num_steps = np.array(num_steps, "int32")
        rows = self._roomy(rows, num_steps)
        return self._decode(rows, num_steps, with_logprobs=with_logprobs)[:3]

    def advance_telling(self, rows: Rows, num_steps: int, num_likely: int, asked: bool):
        """As `advance`, by one program whether log probabilities are asked for or not.

        Returns the new rows; the tokens; log probabilities of the same shape; and a `Likely`, with
        the `num_likely` likeliest tokens at each place. The last two are zeros, unless `asked`.
        """
        num_steps = np.array(num_steps, "int32")
        return self._decode(
            self._roomy(rows, num_steps),
            num_steps,
            np.array(asked),
            with_logprobs=True,
            num_likely=num_likely,
        )

    def _roomy(self, rows: Rows, num_steps) -> Rows:
        """`rows` with room for the tokens of a run."""
        if not self._needs_room:
            return rows
        new = np.minimum(ops.convert_to_numpy(rows.remaining), num_steps)
        return rows._replace(state=self.with_room(rows.state, new))

    def speculate(self, rows: Rows, num_rounds: int, num_tokens: int, with_logprobs: bool = False):
        """As `advance`, in at most `num_rounds` rounds with `num_tokens` proposals.

        Returns also the `Outcome`. A row gets at most `DECODE_CAPACITY` tokens.
        """
        most = min(num_rounds * (num_tokens + 1), DECODE_CAPACITY)
        rows = rows._replace(
            state=self.with_room(rows.state, most),
            context=self.speculation.with_room(rows.context, most),
        )
        return self._speculate(
            rows, np.array(num_rounds, "int32"), num_tokens=num_tokens, with_logprobs=with_logprobs
        )

    def decode(
        self, rows: Rows, run_lengths: Iterable[int] = (), with_logprobs: bool = False
    ) -> Decoding:
        """An iterator over the new tokens of the rows, until all have stopped."""
        if self.speculation is not None:
            return SpeculativeDecoding(self, rows, run_lengths, with_logprobs)
        return Decoding(self, rows, run_lengths, with_logprobs)

    def generate(
        self, prompts: list[np.ndarray], limits: np.ndarray, stop_token_ids: Sequence[int]
    ) -> list[np.ndarray]:
        """The tokens that follow each prompt, at most `limits[i]` of them."""
        if not picks_tokens(self.sampler):
            return self.search(prompts, limits, tuple(stop_token_ids))
        return self.decode(self.start(prompts, limits, stop_token_ids)).all_tokens()

    def search(
        self, prompts: list[np.ndarray], limits: np.ndarray, stop_token_ids: tuple[int, ...]
    ) -> list[np.ndarray]:
        """As `generate`, for a sampler that searches with a loop of its own."""
        self._check_prompts(prompts, None)
        rows: list[np.ndarray] = [np.zeros(0, "int32")] * len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts])
        if (lengths + limits).max() > MOST_SEARCHED:
            raise ValueError(
                f"{type(self.sampler).__name__} holds whole rows, of {MOST_SEARCHED} tokens "
                f"at most. Received: {(lengths + limits).max()} tokens, prompt included"
            )
        # The loop of a search begins at the end of the shortest prompt, and would score tokens
        # where longer prompts have their own. So it gets prompts of one length.
        for length in np.unique(lengths):
            same = np.flatnonzero(lengths == length)
            found = self._search_group([prompts[i] for i in same], limits[same], stop_token_ids)
            for i, new in zip(same, found, strict=True):
                if len(same) > 1 and np.isin(new, stop_token_ids).any():
                    # The loop went on until all rows had stopped, and changed those that had.
                    [new] = self._search_group([prompts[i]], limits[[i]], stop_token_ids)
                rows[i] = new
        return rows

    def _search_group(
        self, prompts: list[np.ndarray], limits: np.ndarray, stop_token_ids: tuple[int, ...]
    ) -> list[np.ndarray]:
        length = len(prompts[0])
        token_ids, padding_mask = padded(prompts, length + int(limits.max())).values()
        # A search takes a stop token for one wherever no prompt is: 0 is the end in GPT-NeoX'
        # vocabulary, and would be found where nothing has been written yet.
        blank = next(id for id in itertools.count() if id not in stop_token_ids)
        token_ids = np.where(padding_mask, token_ids, np.array(blank, token_ids.dtype))
        found = self._search(token_ids, padding_mask, stop_token_ids=stop_token_ids or None)
        rows = []
        for row, limit in zip(ops.convert_to_numpy(found), limits, strict=True):
            new = row[length : length + limit]
            stops = np.flatnonzero(np.isin(new, stop_token_ids))
            rows.append(new[: stops[0] + 1] if len(stops) else new)
        return rows

    def loss(self, token_ids: np.ndarray) -> float:
        """The sum of the losses of all tokens after the first, the state carried along."""
        self._check_prompts([token_ids], None)
        state, total = self.empty_state(len(token_ids)), 0.0
        bar = tqdm.auto.tqdm(
            total=len(token_ids), unit=" tokens", disable=len(token_ids) <= LONG_PROMPT
        )
        pairs = zip(blocks([token_ids[:-1]]), blocks([token_ids[1:]]), strict=True)
        for (inputs, mask), (targets, _) in pairs:
            state, loss = self._block_loss(state, inputs, targets, mask)
            total += float(loss)
            bar.update(inputs.shape[1])
        bar.close()
        if not np.isfinite(total):
            raise ValueError(f"The loss is not finite. {NOT_FINITE_REASON}")
        return total

    def _check_prompts(self, prompts: list[np.ndarray], state: Mamba2State | None) -> None:
        waiting = None
        if state is not None:
            check_belongs(state, self.model.backbone)
            waiting = ops.convert_to_numpy(state.token)
        check_prompts(prompts, self.model.backbone.vocabulary_size, waiting)


def prompts_of(inputs: Mapping[str, Any]) -> tuple[list[np.ndarray], np.ndarray]:
    """The rows without their padding, and how many tokens fit after each."""
    token_ids = np.asarray(ops.convert_to_numpy(inputs["token_ids"]))
    padding_mask = np.asarray(ops.convert_to_numpy(inputs["padding_mask"]))
    prompts = rows_of(token_ids, padding_mask)
    return prompts, token_ids.shape[1] - padding_mask.astype(bool).sum(axis=1)
