"""The decode loop of hybrids, compiled for a TPU without one: `python -m benchmarks.hybrids_tpu`.

One row in bfloat16, at the presets' real sizes, with the traffic of HBM in a step counted in the
scheduled program as in `tpu_aot.py`, beside the least that a step must move: the weights (of
experts those that the token takes, of an untied embedding one row), the state of the mixers read
and written, and keys and values of all places for which there is room.
"""

import json
from pathlib import Path
from typing import Annotated
from typing import Any

from benchmarks import tpu_aot  # isort: skip  it sets what JAX reads when it is imported

import jax
import numpy as np
import typer
from keras import tree

from benchmarks.programs import rows_and_weights
from benchmarks.report import HERE
from benchmarks.report import write_table
from keras_mamba2 import Mamba2CausalLM
from keras_mamba2 import Mamba2HybridBackbone
from keras_mamba2._compat.keras_layers import flatten_layers
from keras_mamba2.conversion.config import read_constructor_arguments
from keras_mamba2.conversion.deferred import deferred_initialization
from keras_mamba2.generation import Generator
from keras_mamba2.layers import MixtureOfExperts
from keras_mamba2.preset_files import Preset

PRESETS = ("granite_4.0_h_micro", "granite_4.0_h_tiny", "nemotron_h_8b")


def main(
    preset: Annotated[list[str], typer.Option(help="repeatable")] = PRESETS,
    room: Annotated[int, typer.Option(help="of keys and values, in tokens")] = 4096,
    blocks: Annotated[int | None, typer.Option(help="the first so many")] = None,
    file: Annotated[Path, typer.Option()] = HERE / "results" / "hybrids_tpu.json",
):
    """Compiles, and writes what moves in a step to a JSON file and the README's table."""
    found = {}
    for name in preset:
        found[name] = measure(abstract_model(name, blocks), room)
        print(name, found[name], flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        "| | HBM of a step, GB | at least | times | loops |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        cells = row["hbm_gb"], row["least_gb"], f"{row['times']:.3f}", row["loops"]
        lines.append(f"| `{name}` | {' | '.join(map(str, cells))} |")
    write_table("\n".join(lines), file.resolve().parents[1] / "README.md", "hybrids_tpu")


def abstract_model(name: str, blocks: int | None) -> Mamba2CausalLM:
    """A model whose variables have shapes and no values."""
    arguments = read_constructor_arguments(Preset(name).folder)
    arguments["blocks"] = arguments["blocks"][:blocks]
    with deferred_initialization():
        backbone = Mamba2HybridBackbone(**arguments, dtype="bfloat16")
    lm = Mamba2CausalLM(backbone)
    lm.compile(sampler="greedy")
    return lm


def measure(lm: Mamba2CausalLM, room: int) -> dict[str, Any]:
    state = jax.eval_shape(lambda: lm.backbone.initial_state(1, room))
    weights, rows = rows_and_weights(lm, state, tpu_aot.on_tpu)
    steps = (tpu_aot.on_tpu((), "int32"),)
    _, module = tpu_aot.compile_and_read(Generator(lm)._decode.program.trace(weights, rows, steps))
    [loop, *others] = module.loops()
    moved = sum(n for n, _ in module.traffic(loop.called[0]))
    least = least_bytes(lm.backbone, room)
    return {
        "hbm_gb": round(moved / 1e9, 3),
        "least_gb": round(least / 1e9, 3),
        "times": round(moved / least, 4),
        "loops": 1 + len(others),
        "host_transfers": module.host_transfers(),
    }


def least_bytes(backbone, room: int) -> float:
    embedding = backbone.token_embedding
    total = sum(size_of(v) for v in backbone.variables) * 1.0
    if not embedding.tie_weights:
        total -= size_of(embedding.embeddings)  # one row of it is read
    for block in backbone.blocks:
        for part in block.parts:
            total -= sum(
                size_of(v) * (1 - layer.num_experts_per_token / layer.num_experts)
                for layer in experts_in(part)
                for v in layer.weights
                if "experts_" in v.path
            )
    for spec in tree.flatten(backbone.state_spec(room)):
        size = np.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        total += size if spec.room_axis is not None else 2 * size
    return total


def experts_in(layer) -> list[MixtureOfExperts]:
    return [part for part in flatten_layers(layer) if isinstance(part, MixtureOfExperts)]


def size_of(variable) -> int:
    return int(np.prod(variable.shape)) * np.dtype(variable.dtype).itemsize


if __name__ == "__main__":
    typer.run(main)
