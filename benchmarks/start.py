"""From the start of a process to its first token: `python -m benchmarks.start`.

Every figure is of a process of its own, all subjects by turns, files in the system's cache. Seconds
of the clock, and of all processors together, which a busy machine changes less. 130M in float32
with random weights, a prompt of 128 tokens; from the command line the embedded preset.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated
from typing import Any

import numpy as np
import typer
from tqdm import tqdm

from benchmarks.adapters import ADAPTERS
from benchmarks.report import HERE
from benchmarks.report import OURS
from benchmarks.report import number
from benchmarks.report import write_table
from benchmarks.rounds import ENVIRONMENT
from benchmarks.rounds import TIMEOUT
from benchmarks.rounds import describe_run
from benchmarks.rounds import module
from benchmarks.workload import FULL
from benchmarks.workload import QUICK
from benchmarks.workload import Workload

MEANWHILE, CACHED = f"{OURS}, compiled while loading", f"{OURS}, compiled before"
COMMAND, COMMAND_CACHED = "command line", "command line, compiled before"
PEERS = ("transformers", "mamba2-jax", "llama.cpp, bfloat16")
SUBJECTS = (OURS, MEANWHILE, CACHED, COMMAND, COMMAND_CACHED, *PEERS)
STAGES = ("import_s", "load_s", "first_token_s")
LABELS = {"wall_s": "whole process, s", "cpu_s": "of all processors, s", "peak_mb": "peak, MB"}
LABELS = {"import_s": "import, s", "load_s": "load, s", "first_token_s": "first token, s"} | LABELS


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    subject: Annotated[list[str], typer.Option(help="repeatable")] = SUBJECTS,
    quick: Annotated[bool, typer.Option(help="a tiny model, to try the command")] = False,
    folder: Annotated[Path, typer.Option(help="of README.md and results/")] = HERE,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
    weights: Annotated[Path | None, typer.Option(hidden=True)] = None,
):
    """Measures all subjects, writes results/start.json and the README's table."""
    workload = QUICK if quick else FULL
    if child is not None:
        print(json.dumps(stages(child, workload, weights)))
        return
    path = folder.resolve() / "results" / "start.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = describe_run() | {"rounds": []}
    with tempfile.TemporaryDirectory() as temporary:
        changes = json.dumps(asdict(workload))
        command = [*module("checkpoint"), temporary, "--changes", changes]
        subprocess.run(command, cwd=HERE.parent, check=True)
        for name in {CACHED, COMMAND_CACHED} & set(subject):
            measure(name, Path(temporary), quick)  # fills the cache
        plan = [(i, name) for i in range(rounds) for name in subject]
        for i, name in tqdm(plan, unit="process"):
            results["rounds"] += [{}] if len(results["rounds"]) == i else []
            results["rounds"][i][name] = measure(name, Path(temporary), quick)
            path.write_text(json.dumps(results, indent=2) + "\n")
    write_table(table(results["rounds"]), folder.resolve() / "README.md", "start")


def measure(name: str, weights: Path, quick: bool) -> dict[str, float] | dict[str, str]:
    """A process from its start to its end, after one token."""
    compiled = str(weights / "compiled")
    environment = os.environ | ENVIRONMENT
    if name in (COMMAND, COMMAND_CACHED):
        cache = compiled if name == COMMAND_CACHED else "off"
        program = Path(sys.executable).with_name("keras-mamba2")
        command = [str(program), "generate", "ROMEO:", "--max-new-tokens=1", "--seed=1"]
        environment["KERAS_MAMBA2_COMPILATION_CACHE"] = cache
    else:
        command = [*module("start"), "--child", name, "--weights", str(weights)]
        command += ["--quick"] * quick
        if name == CACHED:
            environment["JAX_COMPILATION_CACHE_DIR"] = compiled
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        return {"failed": f"exit status {done.returncode}: {done.stderr.strip()[-1000:]}"}
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"wall_s": seconds, "cpu_s": cpu}
    if name not in (COMMAND, COMMAND_CACHED):
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def stages(name: str, workload: Workload, weights: Path | None) -> dict[str, Any]:
    """What takes how long in this process. Each package is imported as its users do."""
    ours = name in (OURS, MEANWHILE, CACHED)
    adapter, dtype = ADAPTERS[OURS if ours else name]
    marks = [time.perf_counter()]
    try:
        for package in adapter.packages:
            import_module(package)
    except ModuleNotFoundError as error:
        return {"absent": str(error)}
    marks.append(time.perf_counter())
    prompt = np.random.default_rng(0).integers(0, 256, (1, workload.prompt_tokens), "int32")
    if ours:
        lm = load(weights, prompt.size, name != OURS)
        marks.append(time.perf_counter())
        inputs = {"token_ids": prompt, "padding_mask": np.ones_like(prompt)}
        lm.generate(inputs, max_new_tokens=1, stop_token_ids=None)
    else:
        model = adapter(replace(workload, dtype=dtype or workload.dtype), weights)
        marks.append(time.perf_counter())
        model.prefill(prompt)
    marks.append(time.perf_counter())
    found = {stage: b - a for stage, a, b in zip(STAGES, marks[:-1], marks[1:], strict=True)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found | {"peak_mb": peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6}


def load(weights: Path | None, prompt_length: int, meanwhile: bool):
    """Our model; if asked for, what the prompt needs is compiled while its weights are read."""
    import keras_mamba2

    def prepare(lm):
        lm.compile(sampler="greedy")
        if meanwhile:
            lm.warm_up(prompt_lengths=prompt_length, wait=False)

    return keras_mamba2.Mamba2CausalLM.from_preset(
        str(weights), preprocessor=None, on_built=prepare
    )


def table(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """Medians over the rounds, with the least and the most of the clock's."""
    names = [name for name, found in rounds[0].items() if {"absent", "failed"}.isdisjoint(found)]
    lines = [f"| | {' | '.join(LABELS.values())} |", "| --- |" + " --- |" * len(LABELS)]
    for name in names:
        cells = []
        for key in LABELS:
            values = [found[name][key] for found in rounds if key in found.get(name, {})]
            cell = number(statistics.median(values)) if values else ""
            if values and key == "wall_s":
                cell += f" ({number(min(values))} to {number(max(values))})"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
