"""Measures `keras_mamba2` and its peers on a GPU: `python -m benchmarks.gpu`.

One file of results a size, as of `python -m benchmarks`. Ours needs keras, keras-hub and jax with
CUDA; transformers, mamba_ssm and mamba2-jax are measured where they are installed, and reported
as absent where not. Weights are random, made on the GPU in bfloat16 (mamba2-jax: in float32, it
has no other). `python -m benchmarks.report results/gpu_130m.json` makes table and plot of a file.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from typing import Literal

import typer

from benchmarks.report import LOOP
from benchmarks.report import MACHINE
from benchmarks.report import OURS
from benchmarks.report import summarize
from benchmarks.report import table
from benchmarks.rounds import HERE
from benchmarks.rounds import measure_rounds
from benchmarks.workload import QUICK
from benchmarks.workload import SIZES
from benchmarks.workload import of_size

# Our loop as one CUDA graph: the device itself decides whether to go on. Else the host does,
# between the steps, after waiting for them.
ONE_GRAPH = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"}
GRAPHED = ", one graph"
SUBJECTS = {
    MACHINE: MACHINE,
    OURS: OURS,
    OURS + GRAPHED: OURS,
    LOOP: LOOP,
    LOOP + GRAPHED: LOOP,
    "transformers": "transformers",
    "mamba_ssm": "mamba_ssm",
    "mamba2-jax": "mamba2-jax",
}
ENVIRONMENTS = {name: ONE_GRAPH for name in SUBJECTS if name.endswith(GRAPHED)}


def main(
    size: Annotated[list[str], typer.Option(help=f"of {', '.join(SIZES)}; repeatable")] = (
        "130m",
        "2.7b",
    ),
    batch_size: Annotated[list[int], typer.Option(help="for decoding; repeatable")] = (1, 64),
    prefill_tokens: Annotated[list[int], typer.Option(help="repeatable")] = (2048, 8192),
    long_context: Annotated[int, typer.Option(help="decoding after so many tokens")] = 16384,
    subject: Annotated[list[str], typer.Option(help="repeatable")] = tuple(SUBJECTS),
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    platform: Annotated[Literal["gpu", "cpu"], typer.Option()] = "gpu",
    quick: Annotated[bool, typer.Option(help="tiny shapes, to try the command")] = False,
    folder: Annotated[Path, typer.Option(help="of the results")] = HERE / "results",
):
    """Measures all subjects at all sizes, and prints and writes the results."""
    subjects, failed = {name: SUBJECTS[name] for name in subject}, []
    for name in size:
        workload = replace(QUICK, dtype="bfloat16", platform=platform)
        if not quick:
            workload = of_size(
                name,
                dtype="bfloat16",
                platform=platform,
                long_contexts=(long_context,),
                long_batch_sizes=tuple(batch_size),
                decode_tokens=128,
                prefill_tokens=tuple(prefill_tokens),
                chunk_size=256,
                bandwidth_bytes=2**32,
                matmul_size=8192,
            )
        path = folder.resolve() / f"{platform}_{name}.json"
        failed += measure_rounds(path, workload, subjects, batch_size, rounds, ENVIRONMENTS)
        results = json.loads(path.read_text())
        results["summary"] = summarize(results)
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(f"{name}, bfloat16\n\n{table(results)}\n")
    if failed:
        raise SystemExit(f"Failed, for reasons in the results: {', '.join(sorted(set(failed)))}")


if __name__ == "__main__":
    typer.run(main)
