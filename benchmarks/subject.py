"""Measures one subject in this process and prints what it found as one line of JSON.

`python -m benchmarks.subject keras_mamba2 --batch-size 1`; the subjects are the models of
`adapters.py`, `machine` for its ceilings, `loop` for what our decode loop is made of, and
`compiler` for the time that our programs take to be compiled. A
figure is the median of a few repeats after a warm-up, but for those of the start.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.adapters import ADAPTERS
from benchmarks.adapters import Adapter
from benchmarks.hlo import Module
from benchmarks.report import COMPILER
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
    weights: Annotated[Path | None, typer.Option(help="a folder of `checkpoint.py`")] = None,
):
    workload = replace(QUICK if quick else FULL, **json.loads(changes))
    if name == MACHINE:
        measured = measure_machine(workload)
    elif name == LOOP:
        measured = measure_loop(workload)
    elif name == COMPILER:
        measured = measure_compiler(workload)
    else:
        measured = measure(name, workload, batch_size, weights)
    print(json.dumps(measured))


def measure_machine(workload: Workload) -> Figures:
    """The ceilings: a matrix-vector product and a copy for bandwidth, a matrix product."""
    jax = import_module("jax")
    columns, size = 2**10, workload.matmul_size

    workload = replace(workload, repeats=3 * workload.repeats)

    def seconds_of(function: Callable, dtype: str, *shapes: tuple[int, ...]) -> float:
        arguments = [jax.numpy.ones(shape, dtype) for shape in shapes]
        compiled = jax.jit(function)
        return median_seconds(lambda: compiled(*arguments).block_until_ready(), workload)

    rows = workload.bandwidth_bytes // 4 // columns
    matmul, copy, gigabytes = jax.numpy.matmul, jax.numpy.copy, 4e-9 * rows * columns
    square = (size, size)
    return {
        "read_gb_per_s": gigabytes / seconds_of(matmul, "float32", (rows, columns), (columns,)),
        "copy_gb_per_s": 2 * gigabytes / seconds_of(copy, "float32", (rows, columns)),
        "matmul_gflop_per_s": 2e-9 * size**3 / seconds_of(matmul, workload.dtype, square, square),
    }


def measure_loop(workload: Workload) -> Figures:
    """Whether the decode loop leaves the device: its program, and its time beside single steps.

    The steps are queued one after the other, so that the device need not wait between them
    either, unless queueing takes longer than a step.
    """
    model = ADAPTERS[OURS].adapter(workload, None)
    module = Module(model.decode_program_text())
    (loop,) = module.loops()
    model.prefill(random_prompt(workload, workload.prompt_tokens))
    tokens = workload.decode_tokens
    loop_s = median_seconds(lambda: model.decode(tokens), workload)
    steps_s = median_seconds(lambda: model.decode_by_step(tokens), workload)
    return {
        "loops": len(module.loops()),
        "operations_in_loop": len(list(module.walk(loop.called[0]))),
        "host_transfers": len(module.host_transfers()),
        "command_buffers": sum("command_buffer" in name for name in module.computations),
        "loop_ms": 1e3 * loop_s / tokens,
        "steps_ms": 1e3 * steps_s / tokens,
        "loop_of_steps": loop_s / steps_s,
    }


def measure_compiler(workload: Workload) -> Figures:
    """What our two programs take to be traced and compiled, without any weights."""
    jax, programs = import_module("jax"), import_module("benchmarks.programs")
    lm, place = programs.abstract_model(workload), jax.ShapeDtypeStruct
    return {
        "compile_decode_s": seconds(
            lambda: programs.decode_program(lm, 1, place).lower().compile()
        ),
        "compile_prefill_s": seconds(
            lambda: programs.prefill_program(lm, 1, 512, place).lower().compile()
        ),
    }


def measure(
    name: str, workload: Workload, batch_sizes: list[int], weights: Path | None = None
) -> Figures | dict[str, str]:
    adapter, dtype = ADAPTERS[name]
    workload = replace(workload, dtype=dtype or workload.dtype)
    try:
        import_s = seconds(lambda: [import_module(package) for package in adapter.packages])
    except ModuleNotFoundError as error:
        return {"absent": str(error)}
    figures = {"import_s": import_s, "peak_mb_import": process_peak_mb()}
    begun = time.perf_counter()
    model = adapter(workload, weights)
    figures["load_s"] = time.perf_counter() - begun
    prompt = random_prompt(workload, workload.prompt_tokens)
    for call in ("first_call_s", "second_call_s"):  # a prompt and one token; the first compiles
        figures[call] = seconds(lambda: model.prefill(prompt))
    for b in batch_sizes:
        figures |= measure_decode(model, workload, b)
    figures["peak_mb_decode"] = peak_mb(model)
    for b in workload.long_batch_sizes if name == OURS else ():
        figures |= measure_long_contexts(model, workload, b)
    if name == OURS:
        alone_s = median_seconds(model.programs_of_one(prompt), workload)
        whole_s = median_seconds(lambda: model.generate_one(prompt), workload)
        figures["generate_of_programs"] = whole_s / alone_s
    figures |= measure_prefill(model, workload)
    return figures | {"peak_mb_prefill": peak_mb(model)}


def measure_decode(model: Adapter, workload: Workload, b: int) -> Figures:
    ms = decode_ms(model, workload, workload.prompt_tokens, b)
    if ms is None:
        return {}
    return {
        f"decode_ms_{b}": ms,
        f"decode_gb_per_s_{b}": workload.decode_bytes(b) / 1e6 / ms,
    }


def measure_long_contexts(model: Adapter, workload: Workload, b: int) -> Figures:
    figures = {}
    for context in workload.long_contexts:
        # Before and after the long context: a machine that slows down meanwhile is no effect of it.
        before = decode_ms(model, workload, workload.prompt_tokens, b)
        long = decode_ms(model, workload, context, b)
        after = decode_ms(model, workload, workload.prompt_tokens, b)
        if before and long and after:
            figures[f"long_context_{b}_{context}"] = 2 * long / (before + after)
    return figures


def measure_prefill(model: Adapter, workload: Workload) -> Figures:
    figures: Figures = {}
    second = 0.0  # what a token took in the length before
    for t in workload.prefill_tokens:
        if t * second > workload.limit_s:
            break
        prompt = random_prompt(workload, t)
        taken = median_seconds(lambda prompt=prompt: model.prefill(prompt), workload)
        second = taken / t
        figures[f"prefill_tokens_per_s_{t}"] = 1 / second
        figures[f"prefill_gflop_per_s_{t}"] = workload.prefill_flops(t) / 1e9 / taken
    return figures


def decode_ms(
    model: Adapter, workload: Workload, context: int, batch_size: int = 1
) -> float | None:
    """Milliseconds a step, which makes one token a row, after a prompt of `context` tokens.

    None if a step takes longer than the limit.
    """
    model.prefill(random_prompt(workload, context, batch_size))
    model.decode(1)
    one = seconds(lambda: model.decode(1))
    if one > workload.limit_s / 4:
        return None
    tokens = max(1, min(workload.decode_tokens, int(workload.budget_s / 2 / one)))
    return 1e3 * median_seconds(lambda: model.decode(tokens), workload) / tokens


def median_seconds(function: Callable[[], object], workload: Workload) -> float:
    """After a warm-up, which may compile, of so many repeats as the budget allows, one at least."""
    function()
    taken: list[float] = []
    while len(taken) < workload.repeats and sum(taken) < workload.budget_s:
        taken.append(seconds(function))
    return statistics.median(taken)


def seconds(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


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
