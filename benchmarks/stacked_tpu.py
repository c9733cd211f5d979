"""Compiles what a first `generate` needs for a TPU, with blocks apart and stacked.

`python -m benchmarks.stacked_tpu`: what `Mamba2CausalLM.stack_blocks` gains in time to compile, and
costs in traffic. See `tpu_aot.py` for what is read from a program. Of decoding it is a step, at 16
rows and more with one writing of the state, which is for 12 steps.
"""

import json
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated
from typing import Any

import typer

from benchmarks.tpu_aot import CHUNK_SIZE
from benchmarks.tpu_aot import describe
from benchmarks.tpu_aot import on_tpu

# isort: split
# The settings of `tpu_aot.py` come before JAX.
from benchmarks.programs import abstract_model
from benchmarks.programs import decode_program
from benchmarks.programs import prefill_program
from benchmarks.report import number
from benchmarks.report import write_table
from benchmarks.workload import SIZES
from benchmarks.workload import of_size
from keras_mamba2.generation.decode import default_steps_a_write
from keras_mamba2.host.blocks import BLOCK_SIZES
from keras_mamba2.ops.platform import compiling_for

KEYS = ("compile_s", "hbm_gb", "temporaries_gb", "loops", "host_transfers")
LONG_BLOCK = 2048
FILE = Path(__file__).parent / "results" / "stacked_tpu.json"


def main(
    size: Annotated[str, typer.Option(help=f"of {', '.join(SIZES)}")] = "2.7b",
    batch_size: Annotated[list[int], typer.Option(help="of decoding; repeatable")] = (1, 8, 64),
    block: Annotated[list[int], typer.Option(help="of a prefill; repeatable")] = (
        LONG_BLOCK,
        *BLOCK_SIZES,
    ),
    only_stacked: Annotated[bool, typer.Option(help="what takes minutes is left out")] = False,
    file: Annotated[Path, typer.Option()] = FILE,
):
    """Compiles each program, and writes a JSON file and the README's table."""
    workload = of_size(size, dtype="bfloat16", chunk_size=CHUNK_SIZE)
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: metadata.version(name) for name in ("jax", "libtpu", "keras")},
        "size": size,
        "programs": [],
    }
    for stacked in (True,) if only_stacked else (False, True):
        lm = abstract_model(workload, stacked=stacked)
        for b in batch_size:
            with compiling_for("tpu"):
                steps = default_steps_a_write(b)
            row = describe(decode_program(lm, b, on_tpu, steps), in_loop=True)
            add(found, row, file, program=f"decode, batch {b}", stacked=stacked)
        for tokens in block:
            row = describe(prefill_program(lm, 1, tokens, on_tpu), in_loop=False)
            add(found, row, file, program=f"prefill, {tokens}", stacked=stacked)
    write_table(table(found["programs"]), file.resolve().parents[1] / "README.md", "stacked_tpu")


def add(found: dict[str, Any], row: dict[str, Any], file: Path, **what) -> None:
    found["programs"].append(what | {key: row[key] for key in KEYS})
    print(json.dumps(found["programs"][-1]), flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | compile, s | stacked | HBM, GB | stacked |", "| --- |" + " --- |" * 4]
    by_name: dict[str, dict[bool, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["program"], {})[row["stacked"]] = row
    for name, pair in by_name.items():
        cells = [
            number(pair[stacked][key]) if stacked in pair else ""
            for key in ("compile_s", "hbm_gb")
            for stacked in (False, True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
