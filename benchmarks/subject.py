"""Measures one subject in this process and prints what it found as one line of JSON.

`python -m benchmarks.subject keras_mamba2 --batch-size 1`; the subjects are the models of
`adapters.py`, `machine` for its ceilings, and `loop` for what our decode loop is made of. Every
figure is the median of a few repeats after a warm-up.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Annotated

import numpy as np
import typer

from benchmarks.adapters import ADAPTERS
from benchmarks.adapters import Adapter
from benchmarks.hlo import Module
from benchmarks.report import LOOP
from benchmarks.report import MACHINE
from benchmarks.report import OURS
from benchmarks.workload import FULL
from benchmarks.workload import QUICK
from benchmarks.workload import Workload

Figures = dict[str, float]


def main(
    name: str,
    batch_size: Annotated[list[int], typer.Option()],
    quick: bool = False,
    changes: Annotated[str, typer.Option(help="of the workload's fields, as JSON")] = "{}",
):
    workload = replace(QUICK if quick else FULL, **json.loads(changes))
    if name == MACHINE:
        measured = measure_machine(workload)
    elif name == LOOP:
        measured = measure_loop(workload)
    else:
        measured = measure(name, workload, batch_size)
    print(json.dumps(measured))


def measure_machine(workload: Workload) -> Figures:
    """The ceilings: a matrix-vector product and a copy for bandwidth, a matrix product."""
    jax = import_module("jax")
    columns, size = 2**10, workload.matmul_size

    def seconds(function: Callable, dtype: str, *shapes: tuple[int, ...]) -> float:
        arguments = [jax.numpy.ones(shape, dtype) for shape in shapes]
        compiled = jax.jit(function)
        return median_seconds(
            lambda: compiled(*arguments).block_until_ready(), 3 * workload.repeats
        )

    rows = workload.bandwidth_bytes // 4 // columns
    matmul, copy, gigabytes = jax.numpy.matmul, jax.numpy.copy, 4e-9 * rows * columns
    square = (size, size)
    return {
        "read_gb_per_s": gigabytes / seconds(matmul, "float32", (rows, columns), (columns,)),
        "copy_gb_per_s": 2 * gigabytes / seconds(copy, "float32", (rows, columns)),
        "matmul_gflop_per_s": 2e-9 * size**3 / seconds(matmul, workload.dtype, square, square),
    }


def measure_loop(workload: Workload) -> Figures:
    """Whether the decode loop leaves the device: its program, and its time beside single steps.

    The steps are queued one after the other, so that the device need not wait between them
    either, unless queueing takes longer than a step.
    """
    model = ADAPTERS[OURS](workload)
    module = Module(model.decode_program_text())
    (loop,) = module.loops()
    model.prefill(random_prompt(workload, workload.prompt_tokens))
    tokens = workload.decode_tokens
    loop_s = median_seconds(lambda: model.decode(tokens), workload.repeats)
    steps_s = median_seconds(lambda: model.decode_by_step(tokens), workload.repeats)
    return {
        "loops": len(module.loops()),
        "operations_in_loop": len(list(module.walk(loop.called[0]))),
        "host_transfers": len(module.host_transfers()),
        "command_buffers": sum("command_buffer" in name for name in module.computations),
        "loop_ms": 1e3 * loop_s / tokens,
        "steps_ms": 1e3 * steps_s / tokens,
        "loop_of_steps": loop_s / steps_s,
    }


def measure(name: str, workload: Workload, batch_sizes: list[int]) -> Figures | dict[str, str]:
    try:
        for package in ADAPTERS[name].packages:
            import_module(package)
    except ModuleNotFoundError as error:
        return {"absent": str(error)}
    figures = {"peak_mb_import": process_peak_mb()}
    model = ADAPTERS[name](workload)
    for call in ("first_call_s", "second_call_s"):  # a prompt and one token; the first compiles
        begun = time.perf_counter()
        model.prefill(random_prompt(workload, workload.prompt_tokens))
        figures[call] = time.perf_counter() - begun
    for b in batch_sizes:
        figures[f"decode_ms_{b}"] = ms = decode_ms(model, workload, workload.prompt_tokens, b)
        figures[f"decode_gb_per_s_{b}"] = workload.decode_bytes(b) / 1e6 / ms
    figures["peak_mb_decode"] = peak_mb(model)
    for b in workload.long_batch_sizes if name == OURS else ():
        # Before and after the long context: a machine that slows down meanwhile is no effect of it.
        before = decode_ms(model, workload, workload.prompt_tokens, b)
        long = decode_ms(model, workload, workload.long_prompt_tokens, b)
        short = (before + decode_ms(model, workload, workload.prompt_tokens, b)) / 2
        figures |= {
            f"decode_ms_short_{b}": short,
            f"decode_ms_long_{b}": long,
            f"long_context_{b}": long / short,
        }
    for t in workload.prefill_tokens:
        prompt = random_prompt(workload, t)
        seconds = median_seconds(lambda prompt=prompt: model.prefill(prompt), workload.repeats)
        figures[f"prefill_tokens_per_s_{t}"] = t / seconds
        figures[f"prefill_gflop_per_s_{t}"] = workload.prefill_flops(t) / 1e9 / seconds
    return figures | {"peak_mb_prefill": peak_mb(model)}


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


def peak_mb(model: Adapter) -> float:
    """The most memory that the model has held so far where it runs, in 10^6 bytes."""
    device = model.device_peak_bytes()
    return process_peak_mb() if device is None else device / 1e6


def process_peak_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    typer.run(main)
