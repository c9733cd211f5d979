"""What an engine delivers, collected."""

import threading
import time

import numpy as np

from keras_mamba2.serving.requests import Request

GREEDY = {"temperature": 0.0}


class Collected:
    """A request to an engine, and what comes of it."""

    def __init__(self, prompt, limit=12, parameters=GREEDY, on_delivery=None, **options):
        if isinstance(prompt, str):
            prompt = list(prompt.encode())
        self.deliveries = []
        self._has_ended = threading.Event()
        self._on_delivery = on_delivery
        self.request = Request(
            np.array(prompt, "int32"), limit, parameters, self._deliver, **options
        )

    def _deliver(self, delivery):
        self.deliveries.append(delivery)
        if self._on_delivery:
            self._on_delivery(delivery)
        if len(self.reasons) + len(self.errors) == self.request.count:
            self._has_ended.set()

    def submit(self, engine):
        engine.submit([self.request])
        return self

    def wait(self):
        assert self._has_ended.wait(timeout=120)
        return self

    def tokens(self, sequence=0):
        self.wait()
        mine = [d.token_ids for d in self.deliveries if d.sequence == sequence]
        return np.concatenate(mine).tolist()

    @property
    def reasons(self):
        return [d.finish_reason for d in self.deliveries if d.finish_reason]

    @property
    def errors(self):
        return [d.error for d in self.deliveries if d.error]


def alone(lm, prompt, limit=12, count=1, **options):
    """The new tokens of each sequence by `lm.generate`."""
    ids = np.array([list(prompt.encode()) if isinstance(prompt, str) else prompt])
    _, found = lm.generate(
        {"token_ids": ids, "padding_mask": np.ones_like(ids)},
        max_new_tokens=limit,
        num_return_sequences=count,
        return_logprobs=True,
        **{"stop_token_ids": None, **options},
    )
    return [row["token_ids"].tolist() for row in found]


def wait_until(condition, pause=0.01):
    """Waits for what another thread does."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "It did not happen within a minute."
        time.sleep(pause)
