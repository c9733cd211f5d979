"""Measures one subject in this process and prints what it found as one line of JSON.

`python -m benchmarks.subject keras_mamba2 --batch-size 1`; the subjects are the models of
`adapters.py`, and `machine`. Every figure is the median of a few repeats after a warm-up.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Annotated

import numpy as np
import typer

from benchmarks.adapters import ADAPTERS
from benchmarks.adapters import Adapter
from benchmarks.workload import FULL
from benchmarks.workload import QUICK
from benchmarks.workload import Workload

MACHINE = "machine"
Figures = dict[str, float]


def main(name: str, batch_size: Annotated[list[int], typer.Option()], quick: bool = False):
    workload = QUICK if quick else FULL
    measured = measure_machine(workload) if name == MACHINE else measure(name, workload, batch_size)
    print(json.dumps(measured))


def measure_machine(workload: Workload) -> Figures:
    """The ceilings: a matrix-vector product for bandwidth, a matrix product for arithmetic."""
    jax = import_module("jax")
    product, columns, size = jax.jit(jax.numpy.matmul), 2**10, workload.matmul_size

    def seconds(*shapes: tuple[int, ...]) -> float:
        a, b = map(jax.numpy.ones, shapes)
        return median_seconds(lambda: product(a, b).block_until_ready(), 3 * workload.repeats)

    numbers = workload.bandwidth_bytes // 4
    return {
        "read_gb_per_s": 4e-9 * numbers / seconds((numbers // columns, columns), (columns,)),
        "matmul_gflop_per_s": 2e-9 * size**3 / seconds((size, size), (size, size)),
    }


def measure(name: str, workload: Workload, batch_sizes: list[int]) -> Figures | dict[str, str]:
    try:
        for package in ADAPTERS[name].packages:
            import_module(package)
    except ModuleNotFoundError as error:
        return {"absent": str(error)}
    figures = {"peak_mb_import": peak_mb()}
    model = ADAPTERS[name](workload)
    for call in ("first_call_s", "second_call_s"):  # a prompt and one token; the first compiles
        begun = time.perf_counter()
        model.prefill(random_prompt(workload, workload.prompt_tokens))
        figures[call] = time.perf_counter() - begun
    for b in batch_sizes:
        figures[f"decode_ms_{b}"] = ms = decode_ms(model, workload, workload.prompt_tokens, b)
        figures[f"decode_gb_per_s_{b}"] = workload.decode_bytes(b) / 1e6 / ms
    figures["peak_mb_decode"] = peak_mb()
    if name == "keras_mamba2":
        # Before and after the long context: a machine that slows down meanwhile is no effect of it.
        before = decode_ms(model, workload, workload.prompt_tokens)
        long = decode_ms(model, workload, workload.long_prompt_tokens)
        short = (before + decode_ms(model, workload, workload.prompt_tokens)) / 2
        figures |= {"decode_ms_short": short, "decode_ms_long": long, "long_context": long / short}
    for t in workload.prefill_tokens:
        prompt = random_prompt(workload, t)
        seconds = median_seconds(lambda prompt=prompt: model.prefill(prompt), workload.repeats)
        figures[f"prefill_tokens_per_s_{t}"] = t / seconds
        figures[f"prefill_gflop_per_s_{t}"] = workload.prefill_flops(t) / 1e9 / seconds
    return figures | {"peak_mb_prefill": peak_mb()}


def decode_ms(model: Adapter, workload: Workload, context: int, batch_size: int = 1) -> float:
    """Milliseconds a step, which makes one token a row, after a prompt of `context` tokens."""
    model.prefill(random_prompt(workload, context, batch_size))
    tokens = workload.decode_tokens
    return 1e3 * median_seconds(lambda: model.decode(tokens), workload.repeats) / tokens


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def random_prompt(workload: Workload, tokens: int, batch_size: int = 1) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, workload.vocabulary_size, (batch_size, tokens), dtype="int32")


def peak_mb() -> float:
    """The most memory that this process has held so far, in 10^6 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    typer.run(main)
