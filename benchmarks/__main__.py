"""Measures `keras_mamba2` and its peers side by side on a CPU: `python -m benchmarks`."""

import subprocess
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import MACHINE
from benchmarks.report import OURS
from benchmarks.rounds import HERE
from benchmarks.rounds import measure_rounds
from benchmarks.rounds import module
from benchmarks.workload import FULL
from benchmarks.workload import QUICK

SUBJECTS = (MACHINE, OURS, "transformers", "mamba2-jax")


def main(
    name: Annotated[str, typer.Option(help="NAME.json and NAME.png in results/")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    batch_size: Annotated[list[int], typer.Option(help="for decoding; repeatable")] = (1,),
    quick: Annotated[bool, typer.Option(help="tiny shapes, to try the command")] = False,
    folder: Annotated[Path, typer.Option(help="of README.md and results/")] = HERE,
):
    """Measures all subjects, writes the results, and from them the table and the plot."""
    path = folder.resolve() / "results" / f"{name}.json"
    subjects = {subject: subject for subject in SUBJECTS}
    failed = measure_rounds(path, QUICK if quick else FULL, subjects, batch_size, rounds)
    subprocess.run([*module("report"), str(path)], cwd=HERE.parent, check=True)
    if failed:
        raise SystemExit(f"Failed, for reasons written to {path}: {', '.join(failed)}")


if __name__ == "__main__":
    typer.run(main)
