"""What an engine delivers, collected."""

import threading

import numpy as np

from keras_mamba2.serving.requests import Request

GREEDY = {"temperature": 0.0}


class Collected:
    """A request to an engine, and what comes of it."""

    def __init__(self, prompt, limit=12, parameters=GREEDY, on_delivery=None, **options):
        if isinstance(prompt, str):
            prompt = list(prompt.encode())
        self.deliveries = []
        self._ended = threading.Semaphore(0)
        self._on_delivery = on_delivery
        self.request = Request(
            np.array(prompt, "int32"), limit, parameters, self._deliver, **options
        )

    def _deliver(self, delivery):
        self.deliveries.append(delivery)
        if self._on_delivery:
            self._on_delivery(delivery)
        if delivery.finish_reason or delivery.error:
            self._ended.release()

    def submit(self, engine):
        engine.submit([self.request])
        return self

    def wait(self):
        for _ in range(self.request.count):
            assert self._ended.acquire(timeout=60)
        return self

    def tokens(self, index=0):
        self.wait()
        self._ended.release(self.request.count)
        mine = [d.token_ids for d in self.deliveries if d.index == index]
        return np.concatenate(mine).tolist()

    def text(self, index=0):
        return bytes(t for t in self.tokens(index) if t < 256).decode(errors="replace")

    @property
    def reasons(self):
        return [d.finish_reason for d in self.deliveries if d.finish_reason]

    @property
    def errors(self):
        return [d.error for d in self.deliveries if d.error]
