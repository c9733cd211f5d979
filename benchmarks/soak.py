"""Hours of mixed requests to a server on this machine: `python -m benchmarks.soak --minutes 60`.

Good requests, whose texts are compared with those of `lm.generate`, beside clients that go in the
middle, requests that are too large, half a JSON, or nonsense. At the end no place and no request
may be left, and memory may not have grown since the first minute.
"""

import asyncio
import collections
import os
import random
import time
from typing import Annotated

os.environ |= {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}

import httpx
import psutil
import typer

import keras_mamba2
from benchmarks.serving import serving
from keras_mamba2.serving.engine import Engine

NAME = "mamba2_tiny_shakespeare"
PATH = "/v1/completions"
TEXTS = ["ROMEO:", "First Citizen:\nBefore", "To be, or not", "JULIET: " * 60, "O " * 900]
MALFORMED = [
    b"",
    b'{"model": ',
    b"\xff\xfe",
    b"[" * 50_000,
    b"null",
    b'{"model": "x", "prompt": 1}',
]
# Which there are, and how often.
KINDS = {"good": 10, "streamed": 10, "gone": 6, "malformed": 3, "large": 1, "parameters": 3}


def main(
    minutes: Annotated[float, typer.Option(help="how long")] = 60.0,
    clients: Annotated[int, typer.Option(help="at once")] = 16,
    growth_mb: Annotated[float, typer.Option(help="that memory may have grown")] = 100.0,
):
    """Serves, disturbs, and raises for any wrong answer and anything left behind."""
    lm = keras_mamba2.Mamba2CausalLM.from_preset(NAME)
    expected = {
        (text, count, seed): lm.generate(
            text,
            max_new_tokens=count,
            strip_prompt=True,
            seed=seed,
            temperature=0.8 if seed else 0.0,
            top_k=lm.backbone.vocabulary_size,
            top_p=1.0,
        )
        for text in TEXTS
        for count in (5, 60, 300)
        for seed in (0, 1)
    }
    engine = Engine(lm, max_sequences=8, max_waiting=12, prefix_cache_bytes=20 * 2**20)
    engine.start()
    with serving(engine, NAME) as address:
        soak = Soak(address, expected)
        memory = asyncio.run(soak.run(60 * minutes, clients))
        _wait_until_idle(engine)
    engine.close()
    print(dict(soak.seen), engine.counts, f"memory in MB, by the minute: {memory}")
    assert not soak.wrong, soak.wrong[:3]
    assert memory[-1] - memory[min(1, len(memory) - 1)] < growth_mb, memory


class Soak:
    """Clients that behave well, and others that do not."""

    def __init__(self, address: str, expected: dict[tuple[str, int, int], str]):
        self.seen: collections.Counter[tuple[str, int]] = collections.Counter()
        self.wrong: list[tuple] = []
        self._address = address
        self._expected = expected

    async def run(self, seconds: float, clients: int) -> list[int]:
        """Returns the memory of the process, in MB, at the start and after each minute."""
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=self._address, timeout=120, limits=limits) as web:
            work = [asyncio.create_task(self._client(web, end, i)) for i in range(clients)]
            memory = [_megabytes()]
            while time.monotonic() < end:
                await asyncio.sleep(min(60, max(end - time.monotonic(), 0)))
                memory.append(_megabytes())
            await asyncio.gather(*work)
        return memory

    async def _client(self, web: httpx.AsyncClient, end: float, seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            [kind] = rng.choices(list(KINDS), KINDS.values())
            status = await getattr(self, kind)(web, rng)
            self.seen[kind, status] += 1

    async def good(self, web: httpx.AsyncClient, rng: random.Random) -> int:
        key, body = self._good_body(rng)
        response = await web.post(PATH, json=body)
        if response.status_code == 200:
            self._compare(key, response.json()["choices"][0]["text"])
        else:
            self._expect(response, 429)
        return response.status_code

    async def streamed(self, web: httpx.AsyncClient, rng: random.Random) -> int:
        key, body = self._good_body(rng)
        text = ""
        async with web.stream("POST", PATH, json={**body, "stream": True}) as response:
            if response.status_code != 200:
                self._expect(response, 429)
                return response.status_code
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += httpx.Response(200, content=line[6:]).json()["choices"][0]["text"]
        self._compare(key, text)
        return response.status_code

    async def gone(self, web: httpx.AsyncClient, rng: random.Random) -> int:
        """In the queue, while the prompt is read, or in the middle of the text."""
        _, body = self._good_body(rng)
        body |= {"max_tokens": 3000, "stream": rng.random() < 0.5}
        try:
            await asyncio.wait_for(web.post(PATH, json=body), rng.random() ** 3)
        except TimeoutError:
            return 0
        return 1

    async def malformed(self, web: httpx.AsyncClient, rng: random.Random) -> int:
        headers = {"Content-Type": "application/json"}
        response = await web.post(PATH, content=rng.choice(MALFORMED), headers=headers)
        return self._expect(response, 400)

    async def large(self, web: httpx.AsyncClient, rng: random.Random) -> int:
        response = await web.post(PATH, json={"model": NAME, "prompt": "x" * 9_000_000})
        return self._expect(response, 413)

    async def parameters(self, web: httpx.AsyncClient, rng: random.Random) -> int:
        _, body = self._good_body(rng)
        bad = [{"n": 99}, {"temperature": -1}, {"stop": ["a"] * 9}, {"max_tokens": 10**6}]
        return self._expect(await web.post(PATH, json={**body, **rng.choice(bad)}), 400)

    def _good_body(self, rng: random.Random) -> tuple[tuple[str, int, int], dict]:
        key = rng.choice(list(self._expected))
        text, count, seed = key
        body = {"model": NAME, "prompt": text, "max_tokens": count, "seed": seed}
        return key, {**body, "temperature": 0.8 if seed else 0.0}

    def _compare(self, key: tuple[str, int, int], text: str) -> None:
        if text != self._expected[key]:
            self.wrong.append((key, self._expected[key], text))

    def _expect(self, response: httpx.Response, status: int) -> int:
        if response.status_code != status:
            self.wrong.append((status, response.status_code))
        return response.status_code


def _megabytes() -> int:
    return psutil.Process().memory_info().rss // 2**20


def _wait_until_idle(engine: Engine) -> None:
    for _ in range(600):
        if not (engine.num_running or engine.num_reading or engine.num_waiting):
            return
        time.sleep(0.1)
    raise AssertionError("Requests are left whose clients have gone.")


if __name__ == "__main__":
    typer.run(main)
