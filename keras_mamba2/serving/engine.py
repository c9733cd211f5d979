"""Continuous batching: a queue of requests, and one thread that owns the device."""

import collections
import logging
import pathlib
import threading
from collections.abc import Sequence

from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import integer
from keras_mamba2.host.blocks import BLOCK_SIZES
from keras_mamba2.host.rows import STOP_TOKEN_CAPACITY
from keras_mamba2.serving.prefix_cache import PrefixCache
from keras_mamba2.serving.requests import Request
from keras_mamba2.serving.scheduler import Counts
from keras_mamba2.serving.scheduler import Scheduler
from keras_mamba2.serving.slots import Slots
from keras_mamba2.state.room import needs_room

MOST_TOKENS = 32_768
MOST_WITH_ROOM = 4_096

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The engine takes no more requests: it is shutting down, or it has failed."""


class Engine:
    """Serves many requests at once with one model, each as if it were alone.

    Args:
        lm: a `Mamba2CausalLM`.
        max_sequences: int, how many sequences run at once.
        max_waiting: int, how many requests may wait.
        max_tokens: int, how many tokens a sequence may have, prompt included. Attention reserves
            room for them. `None` for 32,768, for a model with attention 4,096.
        prefix_cache_bytes: int, of the states that are kept for prompts to come.
        prefix_cache_folder: path, where these states are kept, so that a later engine has them.
        block_size: int, how many tokens of a prompt are read at once: 16, 32, 64, 128 or 512.
            `None` takes what is quick enough for others to go on meanwhile.

    Example:
    ```python
    engine = Engine(lm, max_sequences=8)
    engine.start()
    engine.submit([Request(prompt, 100, {"temperature": 0.0}, deliver=print)])
    engine.close()
    ```
    """

    def __init__(
        self,
        lm,
        max_sequences: int = 8,
        max_waiting: int = 64,
        max_tokens: int | None = None,
        prefix_cache_bytes: int = 2**30,
        prefix_cache_folder: pathlib.Path | None = None,
        block_size: int | None = None,
    ):
        self.lm = lm
        self.max_sequences = SIZE("max_sequences", max_sequences)
        self.max_waiting = SIZE("max_waiting", max_waiting)
        if max_tokens is None:
            max_tokens = MOST_WITH_ROOM if needs_room(lm.backbone) else MOST_TOKENS
        self.max_tokens = integer(at_least=2)("max_tokens", max_tokens)
        prefix_cache_bytes = integer(at_least=0)("prefix_cache_bytes", prefix_cache_bytes)
        if block_size is not None and block_size not in BLOCK_SIZES:
            raise ValueError(
                f"`block_size` must be one of {BLOCK_SIZES}. Received: block_size={block_size}"
            )
        self.prefix_cache = PrefixCache(lm.backbone, prefix_cache_bytes, prefix_cache_folder)
        self.failure: Exception | None = None
        self._generator = lm.make_generate_function()
        self._block_size = block_size
        self._waiting: collections.deque[Request] = collections.deque()
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    def start(self) -> None:
        """Compiles all programs, and begins to serve.

        Raises:
            ValueError: if the sequences do not fit into the device's memory.
        """
        try:
            slots = Slots(self._generator, self.max_sequences, self.max_tokens)
            self._scheduler = Scheduler(self._generator, self.prefix_cache, slots, self._block_size)
            self._scheduler.warm_up()
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise ValueError(
                    f"The device has no memory for {self.max_sequences} sequences of "
                    f"{self.sequence_bytes:,} bytes each, beside the weights. Serve fewer of them. "
                    f"Received: max_sequences={self.max_sequences}, max_tokens={self.max_tokens}"
                ) from error
            raise
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Puts requests at the end of the queue: all of them, or none.

        Raises:
            ValueError: for a request that can never be served.
            QueueFull: if too many wait.
            Closed: after `close`, or a failure.
        """
        for request in requests:
            self._check(request)
        if len(requests) > self.max_waiting:
            raise ValueError(
                f"They are {len(requests)} requests of at most {self.max_sequences} sequences "
                f"each, and {self.max_waiting} may wait. Ask for fewer prompts or choices at once."
            )
        with self._changed:
            if not self.is_ready:
                has_failed = self.failure is not None
                raise Closed(f"The server {'has failed' if has_failed else 'is shutting down'}.")
            if len(self._waiting) + len(requests) > self.max_waiting:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting, {self.max_waiting} may. "
                    "Try again later."
                )
            self._waiting.extend(requests)
            self._changed.notify()

    def cancel(self, request: Request, index: int | None = None) -> None:
        """Ends a request, or one of its sequences. What is under way may still be delivered."""
        with self._changed:
            request.cancelled |= set(range(request.count)) if index is None else {index}
            self._changed.notify()

    def close(self) -> None:
        """Finishes what has been submitted, and what is to be written, and ends."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self.prefix_cache.close()

    @property
    def is_ready(self) -> bool:
        return self._thread.is_alive() and not self._is_closing and self.failure is None

    @property
    def counts(self) -> Counts:
        return self._scheduler.counts

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_reading(self) -> int:
        return len(self._scheduler.reading)

    @property
    def num_running(self) -> int:
        return self._scheduler.slots.used

    @property
    def num_rows(self) -> int:
        """How many rows the loop has now, used or not."""
        return self._scheduler.slots.num_rows

    @property
    def sequence_bytes(self) -> int:
        """The bytes that the state of a sequence takes on the device."""
        return self._generator.empty_state(self.max_tokens).nbytes

    def _check(self, request: Request) -> None:
        size = self.lm.backbone.vocabulary_size
        prompt = request.prompt
        if not len(prompt):
            raise ValueError("The prompt has no tokens. Write some text.")
        if prompt.min() < 0 or prompt.max() >= size:
            bad = prompt[(prompt < 0) | (prompt >= size)][0]
            raise ValueError(f"Token id {bad} is outside the model's vocabulary of {size}.")
        limit = integer(at_least=0 if request.scores_prompt else 1)("limit", request.limit)
        if len(prompt) + limit > self.max_tokens:
            raise ValueError(
                f"This model's maximum context length is {self.max_tokens} tokens. The prompt has "
                f"{len(prompt)}, and {limit} are asked for."
            )
        integer(at_least=1, at_most=self.max_sequences)("count", request.count)
        if len(request.stop_token_ids) > STOP_TOKEN_CAPACITY:
            raise ValueError(f"At most {STOP_TOKEN_CAPACITY} stop tokens are possible.")

    # In the engine's own thread.

    def _serve(self) -> None:
        while self._has_work():
            try:
                self._admit()
                self._scheduler.visit()
            except Exception as error:
                logger.exception("All that was in work is lost.")
                self._recover(error)

    def _has_work(self) -> bool:
        """Waits for work. False when there is none and will be none."""

        def has_work():
            return self.failure is None and bool(self._waiting or self._scheduler.has_work)

        with self._changed:
            self._changed.wait_for(lambda: has_work() or self._is_closing or self.failure)
            return has_work()

    def _admit(self) -> None:
        """Takes as many requests as there are places for, in the order in which they came."""
        while True:
            with self._changed:
                self._waiting = collections.deque(r for r in self._waiting if not r.is_cancelled)
                if not self._waiting or not self._scheduler.has_place_for(self._waiting[0]):
                    return
                request = self._waiting.popleft()
            self._scheduler.admit(request)

    def _recover(self, error: Exception) -> None:
        """Begins anew. If even that is not possible, there is nothing more to be served."""
        try:
            self._scheduler.fail_all(error)
        except Exception as final:
            logger.exception("The engine has failed, and ends.")
            with self._changed:
                self.failure = final
                waiting, self._waiting = self._waiting, collections.deque()
            for request in waiting:
                self._scheduler.fail(request, final)
