"""Measures `keras_mamba2` and its peers side by side on a CPU: `python -m benchmarks`."""

import json
import subprocess
import tempfile
from dataclasses import asdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import COMPILER
from benchmarks.report import MACHINE
from benchmarks.report import OURS
from benchmarks.rounds import HERE
from benchmarks.rounds import measure_rounds
from benchmarks.rounds import module
from benchmarks.workload import QUICK
from benchmarks.workload import SIZES
from benchmarks.workload import of_size

SUBJECTS = (MACHINE, COMPILER, OURS, f"{OURS}, bfloat16", f"{OURS}, int8")
SUBJECTS += ("transformers", "mamba2-jax", "llama.cpp, bfloat16", "llama.cpp, Q8_0")
FIRST_SIZE, *LARGER_SIZES = SIZES
# Of larger models only what one compares sizes by.
LARGER = {"prefill_tokens": (512,), "long_batch_sizes": ()}


def main(
    size: Annotated[list[str], typer.Option(help=f"of {', '.join(SIZES)}; repeatable")] = (
        FIRST_SIZE,
    ),
    name: Annotated[str, typer.Option(help="results/NAME_SIZE.json and results/NAME.png")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[list[int], typer.Option(help="for decoding; repeatable")] = (1, 8, 64),
    subject: Annotated[list[str], typer.Option(help="repeatable")] = SUBJECTS,
    quick: Annotated[bool, typer.Option(help="tiny shapes, to try the command")] = False,
    folder: Annotated[Path, typer.Option(help="of README.md and results/")] = HERE,
):
    """Measures all subjects, writes the results, and from them tables and plots."""
    if unknown := set(size) - set(SIZES):
        raise typer.BadParameter(f"{', '.join(unknown)} is none of {', '.join(SIZES)}.")
    failed = []
    for one in size:
        larger = {} if one == FIRST_SIZE else LARGER
        workload = replace(QUICK, **larger) if quick else of_size(one, **larger)
        batch_sizes = batch_size if one == FIRST_SIZE else batch_size[:1]
        path = folder.resolve() / "results" / f"{name}_{one}.json"
        with tempfile.TemporaryDirectory() as weights:
            changes = json.dumps(asdict(workload))
            subprocess.run(
                [*module("checkpoint"), weights, "--changes", changes], cwd=HERE.parent, check=True
            )
            failed += measure_rounds(
                path,
                workload,
                {name: name for name in subject},
                batch_sizes,
                rounds,
                weights=Path(weights),
            )
    subprocess.run([*module("report"), str(folder.resolve()), name], cwd=HERE.parent, check=True)
    if failed:
        raise SystemExit(f"Failed, for reasons written to the results: {', '.join(failed)}")


if __name__ == "__main__":
    typer.run(main)
