"""Quantized weights on a TPU, compiled without one: `python -m benchmarks.quantized_tpu`.

GB of HBM of a decode step at 2.7B on a v6e, counted in the scheduled program as in `tpu_aot.py`.
What is not a projection or the embedding is in bfloat16.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from typing import NamedTuple

from benchmarks import tpu_aot  # isort: skip  it sets what JAX reads when it is imported

import typer

from benchmarks.programs import abstract_model
from benchmarks.programs import decode_program
from benchmarks.report import HERE
from benchmarks.report import write_table
from benchmarks.workload import of_size

WEIGHTS = ("bfloat16", "int8", "int4")


class Decoding(NamedTuple):
    rows: int
    state_dtype: str | None = None
    steps_a_write: int = 1

    def __str__(self) -> str:
        text = f"{self.rows} rows, states in {self.state_dtype or 'float32'}"
        return "1 row" if self.rows == 1 else f"{text} written every {self.steps_a_write}"


DECODINGS = (Decoding(1), Decoding(64), Decoding(64, "bfloat16", 12))


def main(
    size: Annotated[str, typer.Option()] = "2.7b",
    layers: Annotated[int | None, typer.Option(help="the first so many")] = None,
    weights: Annotated[list[str], typer.Option(help="repeatable")] = WEIGHTS,
    file: Annotated[Path, typer.Option()] = HERE / "results" / "quantized_tpu.json",
):
    """Compiles, and writes what moves in a step to a JSON file and the README's table."""
    found: dict[str, dict[str, float]] = {}
    for decoding in DECODINGS:
        found[str(decoding)] = {}
        for dtype in weights:
            found[str(decoding)][dtype] = gigabytes(size, layers, dtype, decoding)
            print(decoding, found[str(decoding)], flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1) + "\n")
    write_table(table(found), file.resolve().parents[1] / "README.md", "quantized_tpu")


def gigabytes(size: str, layers: int | None, dtype: str, decoding: Decoding) -> float:
    workload = of_size(size, dtype="bfloat16", chunk_size=tpu_aot.CHUNK_SIZE)
    workload = replace(workload, num_layers=layers or workload.num_layers)
    quantization = None if dtype == "bfloat16" else dtype
    lm = abstract_model(workload, quantization, state_dtype=decoding.state_dtype)
    steps = decoding.steps_a_write
    traced = decode_program(lm, decoding.rows, tpu_aot.on_tpu, steps)
    _, module = tpu_aot.compile_and_read(traced)
    moved = [sum(n for n, _ in module.traffic(loop.called[0])) for loop in module.loops()]
    # The inner loop has the steps; the outer one writes the state.
    mean = moved[0] if steps == 1 else moved[0] + (moved[1] - moved[0]) / steps
    return round(mean / 1e9, 3)


def table(found: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(found.values())))
    lines = ["| GB of HBM a step | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for decoding, row in found.items():
        first = next(iter(row.values()))
        cells = [f"{gb:.2f} ({gb / first:.2f})" for gb in row.values()]
        lines.append(f"| {decoding} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
