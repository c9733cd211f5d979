"""What the device does next: read a piece of a prompt, or a few steps of the loop."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable

import keras
import numpy as np

from keras_mamba2.generation import SCORING_SIZES
from keras_mamba2.generation import Generator
from keras_mamba2.host.blocks import BLOCK_SIZES
from keras_mamba2.host.decoding import NOT_FINITE_REASON
from keras_mamba2.host.rows import DECODE_CAPACITY
from keras_mamba2.host.rows import Rows
from keras_mamba2.serving.prefix_cache import PrefixCache
from keras_mamba2.serving.reading import Reading
from keras_mamba2.serving.requests import Delivery
from keras_mamba2.serving.requests import LikelyTokens
from keras_mamba2.serving.requests import Request
from keras_mamba2.serving.slots import Advanced
from keras_mamba2.serving.slots import Slots
from keras_mamba2.state import Mamba2State

logger = logging.getLogger(__name__)

# A run of the loop takes about so long: text comes in small pieces, and yet what happens between
# runs takes little time beside it. Where one token takes longer, a run is one token.
RUN_SECONDS = 0.05
# With more sequences it is longer in proportion: to hand out a piece of text over HTTP takes half a
# millisecond of Python, whether the piece has one token or ten.
SEQUENCES_A_RUN = 25
# With a new sequence a run is short: its first text comes soon, and so do those behind it.
FIRST_STEPS = 8
# While sequences run, prompts are read between two runs for at most so many times a run, or one
# block of so long: a smaller one takes much more time a token.
READING_SHARE = 1.5
BLOCK_SECONDS = 0.1
# Before any text has begun, nobody's text stops: the first sequences wait at most so long for those
# that came with them, each of which is read in so short a time, since a token costs much less in a
# step of many rows.
GATHERING_SECONDS = 20.0
SOON_SECONDS = 1.0
# While nobody has text, a block may take so long: a long one takes much less time a token.
ALONE_SECONDS = 0.25
NOTHING = np.zeros(0, "int32")


@dataclasses.dataclass
class Counts:
    """What has happened since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


@dataclasses.dataclass(eq=False)
class Sequence:
    """One of a request's sequences, which has a place in the loop."""

    request: Request
    index: int
    begun: float = dataclasses.field(default_factory=time.perf_counter)
    token_ids: list[int] = dataclasses.field(default_factory=list)

    @property
    def is_cancelled(self) -> bool:
        return self.index in self.request.cancelled


class Scheduler:
    """Reads prompts and runs the loop, so that neither keeps the other waiting for long.

    It belongs to one thread.

    Args:
        generator: the `Generator` of a model.
        cache: `PrefixCache`.
        slots: `Slots`.
        block_size: int, how many tokens of a prompt are read at once; `None` for as many as those
            who have text meanwhile can wait for, by the times that `warm_up` measures.
    """

    def __init__(
        self, generator: Generator, cache: PrefixCache, slots: Slots, block_size: int | None = None
    ):
        self.counts = Counts()
        self.slots = slots
        self.reading: list[Reading] = []
        self._were_read: list[Reading] = []
        self._due: list[tuple[Sequence, Delivery]] = []
        # Other backends return from a run when it is over.
        self._runs_meanwhile = keras.config.backend() == "jax"
        self._generator = generator
        self._cache = cache
        self._block_sizes = BLOCK_SIZES if block_size is None else (block_size,)
        self._block_seconds: dict[int, float] = {}  # by the size
        self._scoring_seconds = 0.0
        self._reads_shortest = False
        self._run_seconds = 0.0
        self._step_seconds: dict[int, float] = {}  # by the number of rows

    def warm_up(self) -> None:
        """Compiles all programs, and measures how long it takes to read."""
        self.slots.warm_up()
        self._generator.restored(self._empty_state(), self.slots.max_tokens)
        self._block_seconds = {size: self._seconds_to_read(size) for size in BLOCK_SIZES}
        self._scoring_seconds = max(map(self._seconds_to_score, SCORING_SIZES))
        logger.info("Seconds to read a block, by its tokens: %s", self._block_seconds)

    def _seconds_to_read(self, size: int) -> float:
        token_ids = np.zeros(size, "int32")
        return self._seconds(lambda state: self._generator.read(state, token_ids))

    def _seconds_to_score(self, size: int) -> float:
        arguments = np.zeros(size, "int32"), np.zeros(size, "int32"), self.slots.num_likely
        return self._seconds(lambda state: self._generator.read_scoring(state, *arguments)[0])

    def _seconds(self, read: Callable[[Mamba2State], Mamba2State]) -> float:
        """The shortest of several times, which others on the machine have disturbed least."""
        state = self._empty_state()
        times = [time.perf_counter()]
        for _ in range(4):  # the first compiles
            state = read(state)
            times.append(time.perf_counter())
        return float(np.diff(times).min())

    @property
    def has_work(self) -> bool:
        return bool(self.reading or self.slots.used)

    def has_place_for(self, request: Request) -> bool:
        """Those that are cancelled have no places any more: the next visit drops them first."""
        running = sum(not sequence.is_cancelled for sequence in self.slots.owners)
        reading = [reading.request for reading in self.reading]
        promised = sum(other.count for other in reading if not other.is_cancelled)
        return running + promised + request.count <= self.slots.most

    def admit(self, request: Request) -> None:
        """Begins to read a prompt."""
        try:
            sizes = self.slots.max_tokens, self.slots.num_likely
            reading = Reading(request, self._generator, self._cache, *sizes)
        except Exception as error:
            self.fail(request, error)
            return
        self.counts.prompt_tokens += len(request.prompt)
        self.counts.cached_tokens += request.cached_tokens
        self.reading.append(reading)

    def visit(self) -> None:
        """One round: a bounded piece of reading, and mostly one run of the loop.

        States are kept when their tokens have been delivered: a copy of a large one takes a while.
        """
        self._drop_cancelled()
        if self.reading:
            self._hand_out()
        self._read()
        if self._gathers():
            return
        self._run()
        for reading in self._were_read:
            reading.remember()
        self._were_read = []

    def fail_all(self, error: Exception) -> None:
        """Ends all that is in work, and begins with new arrays."""
        self._hand_out()
        for reading in self.reading:
            self.fail(reading.request, error)
        self.reading, self._were_read = [], []
        for sequence in self.slots.owners:
            self._deliver(sequence, Delivery(sequence.index, NOTHING, error=error))
            self.counts.failed += 1
        self.slots.reset()

    def _drop_cancelled(self) -> None:
        going = [reading for reading in self.reading if not reading.request.is_cancelled]
        self.counts.cancelled += len(self.reading) - len(going)
        self.reading = going
        for sequence in self.slots.owners:
            if sequence.is_cancelled:
                self.counts.cancelled += 1
                self.slots.release(sequence)

    def _read(self) -> None:
        """Reads until those that run have waited long enough; one block at least."""
        budget = READING_SHARE * max(RUN_SECONDS, self._run_seconds)
        end = time.perf_counter() + budget
        size = self._largest_block(max(budget, BLOCK_SECONDS))
        block_seconds = self._block_seconds[size]
        if any(reading.request.scores_prompt for reading in self.reading):
            block_seconds = max(block_seconds, self._scoring_seconds)
        while self.reading:
            self._read_block(self._next_to_read(), size)
            if time.perf_counter() + block_seconds > end:
                return

    def _largest_block(self, seconds: float) -> int:
        """How many tokens may be read at once in a time; the smallest block in any case."""
        fast = (size for size in self._block_sizes if self._block_seconds[size] <= seconds)
        return max(fast, default=min(self._block_sizes))

    def _next_to_read(self) -> Reading:
        """In turn the one that is soonest done, and the one that came first.

        So a short prompt does not wait for a long one, and a long one is read in any case.
        """
        self._reads_shortest = not self._reads_shortest
        if not self._reads_shortest:
            return self.reading[0]
        return min(self.reading, key=lambda reading: reading.left)

    def _read_block(self, reading: Reading, size: int) -> None:
        request = reading.request
        try:
            if reading.left:
                if request.scores_prompt:
                    size = max(SCORING_SIZES)
                elif not self._somebody_has_text:
                    size = max(size, self._largest_block(ALONE_SECONDS))
                reading.read(size)
            if reading.left:
                return
            rows = reading.sequences()
            scores = reading.scores
        except Exception as error:
            logger.exception("A prompt could not be read.")
            self.fail(request, error)
        else:
            for index, row in enumerate(rows):
                self._begin(row, Sequence(request, index), scores)
            self._were_read.append(reading)
        self.reading.remove(reading)

    def _begin(self, row: Rows, sequence: Sequence, scores: LikelyTokens | None) -> None:
        """Delivers what is known of the prompt, and lets the sequence run if it may have tokens."""
        limit = sequence.request.limit
        if scores is not None:
            reason = None if limit else "length"
            delivery = Delivery(sequence.index, NOTHING, finish_reason=reason, prompt_likely=scores)
            self._deliver(sequence, delivery)
        if limit:
            self.slots.insert(row, sequence)
        else:
            self.counts.finished += 1

    @property
    def _somebody_has_text(self) -> bool:
        return any(sequence.token_ids for sequence in self.slots.owners)

    def _gathers(self) -> bool:
        """Whether sequences without any text yet wait for a prompt that is soon read.

        They do not wait for one that came when the first of them had been read.
        """
        owners = self.slots.owners
        if not owners or self._somebody_has_text:
            return False
        begun = min(sequence.begun for sequence in owners)
        left = [self._seconds_left(other) for other in self.reading if other.begun < begun]
        waited = time.perf_counter() - begun
        soonest = min(left, default=math.inf)
        return soonest <= SOON_SECONDS and waited + soonest <= GATHERING_SECONDS

    def _seconds_left(self, reading: Reading) -> float:
        """How long it takes to read the rest of a prompt, where nobody has text."""
        if reading.request.scores_prompt:
            return -(-reading.left // max(SCORING_SIZES)) * self._scoring_seconds
        size = self._largest_block(ALONE_SECONDS)
        return -(-reading.left // size) * self._block_seconds[size]

    def _run(self) -> None:
        if not self.slots.used:
            self._hand_out()
            return
        begun = time.perf_counter()
        asked = any(sequence.request.with_likely for sequence in self.slots.owners)
        results = self.slots.advance(self._num_steps(), asked, self._hand_out)
        self._run_seconds = time.perf_counter() - begun
        steps = max(len(result.token_ids) for result in results)
        self._step_seconds[self.slots.num_rows] = self._run_seconds / max(steps, 1)
        self._due += [(result.owner, self._delivery_of(result)) for result in results]
        stopped = [result for result in results if result.has_stopped]
        # Before anybody hears of the end, and goes.
        kept = [r.owner for r in stopped if r.is_finite and not r.owner.is_cancelled]
        if stopped or self._were_read or not self._runs_meanwhile:
            self._hand_out()
        for sequence in kept:
            self._remember(sequence)
        for result in stopped:
            self.slots.release(result.owner)
        self.slots.shrink()

    def _num_steps(self) -> int:
        seconds = self._step_seconds.get(self.slots.num_rows, RUN_SECONDS)
        is_new = any(not sequence.token_ids for sequence in self.slots.owners)
        most = FIRST_STEPS if is_new else DECODE_CAPACITY
        run_seconds = RUN_SECONDS * max(1, self.slots.used / SEQUENCES_A_RUN)
        return int(min(max(run_seconds / seconds, 1), most))

    def _delivery_of(self, result: Advanced) -> Delivery:
        """What a sequence has got from a run."""
        sequence: Sequence = result.owner
        sequence.token_ids += result.token_ids.tolist()
        self.counts.new_tokens += len(result.token_ids)
        if not result.is_finite:
            self.counts.failed += 1
            error = ValueError(f"The logits are not finite. {NOT_FINITE_REASON}")
            return Delivery(sequence.index, NOTHING, error=error)
        likely = result.likely if sequence.request.with_likely else None
        delivery = Delivery(sequence.index, result.token_ids, likely)
        if not result.has_stopped:
            return delivery
        self.counts.finished += 1
        stopped = sequence.token_ids[-1] in sequence.request.stop_token_ids
        return delivery._replace(finish_reason="stop" if stopped else "length")

    def _remember(self, sequence: Sequence) -> None:
        """Keeps the state after a text: a conversation goes on from it."""
        if sequence.request.scores_prompt:
            return
        # The last token has not been read yet.
        read = np.concatenate([sequence.request.prompt, sequence.token_ids[:-1]])
        if self._cache.wants(read):
            self._cache.add(read, self.slots.state_of(sequence))

    def fail(self, request: Request, error: Exception) -> None:
        self.counts.failed += request.count
        for index in range(request.count):
            self._deliver(Sequence(request, index), Delivery(index, NOTHING, error=error))

    def _hand_out(self) -> None:
        """Delivers what is due: at best while the device is at the next run."""
        due, self._due = self._due, []
        for sequence, delivery in due:
            self._deliver(sequence, delivery)

    def _deliver(self, sequence: Sequence, delivery: Delivery) -> None:
        """A receiver that fails has gone: it ends its sequence, and no other."""
        if sequence.is_cancelled:
            return
        try:
            sequence.request.deliver(delivery)
        except Exception as error:
            logger.warning("Nobody receives a sequence any more: %s", error)
            sequence.request.cancelled.add(sequence.index)

    def _empty_state(self):
        return self._generator.empty_state(self.slots.max_tokens)
