"""Compiles a training step for eight TPU chips, without one: `python -m benchmarks.tpu_slice`.

Of each way to cut the model: what the chips say to each other, and the memory that each needs. The
compiler is the real one, as in `tpu_aot.py`; shapes are all that it gets.
"""

import collections
import json
import re
import time
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated
from typing import Any

from benchmarks import tpu_aot  # sets the environment, before JAX is imported

import jax  # isort: skip
import keras
import numpy as np
import typer
from jax.experimental import topologies

from benchmarks.programs import abstract_model
from benchmarks.report import number
from benchmarks.report import write_table
from benchmarks.workload import of_size
from keras_mamba2 import Mamba2Backbone
from keras_mamba2.conversion.deferred import deferred_initialization
from keras_mamba2.training import adamw_recipe

TOPOLOGY = "v6e:2x4x1"
CHIPS = 8
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MESHES = {
    "batch": {"batch": CHIPS},
    "batch and heads": {"batch": 2, "model": 4},
    "sequence": {"batch": 1, "sequence": CHIPS},
}
REMAT = {"stored": False, "computed again": True}  # what is done with the inside of blocks


def main(
    size: Annotated[str, typer.Option()] = "2.7b",
    layers: Annotated[int | None, typer.Option(help="the first so many")] = None,
    batch_size: Annotated[int, typer.Option(help="of all chips together")] = 8,
    tokens: Annotated[int, typer.Option(help="a row")] = 2048,
    mesh: Annotated[list[str], typer.Option(help="repeatable")] = tuple(MESHES),
    blocks: Annotated[list[str], typer.Option(help="repeatable")] = tuple(REMAT),
    file: Annotated[Path, typer.Option()] = Path(__file__).parent / "results" / "tpu_slice.json",
):
    """Writes what the compiler says to a JSON file and the README's table."""
    versions = {name: metadata.version(name) for name in ("jax", "keras", "libtpu")}
    found = {"date": datetime.now(UTC).date().isoformat(), "versions": versions, "programs": []}
    found |= {"size": size, "batch_size": batch_size, "tokens": tokens, "layers": layers}
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in mesh:
        for kept in blocks:
            row = {
                "cut": name,
                "blocks": kept,
                **compiled(size, layers, batch_size, tokens, MESHES[name], REMAT[kept]),
            }
            print(json.dumps(row), flush=True)
            found["programs"].append(row)
            file.write_text(json.dumps(found, indent=2) + "\n")
    write_table(table(found["programs"]), file.resolve().parents[1] / "README.md", "slice")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| cut | blocks | {' | '.join(COLLECTIVES)} | arguments, GB | temporaries, GB |",
        "| --- |" + " --- |" * (len(COLLECTIVES) + 3),
    ]
    for row in rows:
        cells = [row["cut"], row["blocks"]]
        cells += [str(row["collectives"].get(kind, 0)) for kind in COLLECTIVES]
        cells += [number(row["arguments_gb"]), number(row["temporaries_gb"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compiled(size, layers, batch_size, tokens, axes, remat) -> dict[str, Any]:
    mesh = keras.distribution.DeviceMesh(
        tuple(axes.values()), list(axes), [f"tpu:{i}" for i in range(CHIPS)]
    )
    topology = topologies.get_topology_desc(topology_name=TOPOLOGY, platform="tpu")
    devices = np.array(topology.devices).reshape(mesh.shape)
    # Keras would look for the devices on this machine.
    mesh._backend_mesh = jax.sharding.Mesh(devices, mesh.axis_names)
    distribution = keras.distribution.ModelParallel(
        layout_map=Mamba2Backbone.get_layout_map(mesh), batch_dim_name="batch"
    )
    step, arguments = training_step(size, layers, batch_size, tokens, remat, distribution)
    with distribution.scope():
        traced = jax.jit(step, donate_argnums=(0, 1, 2)).trace(*arguments)
        begun = time.perf_counter()
        program, text = tpu_aot.compile_and_dump(traced)
    memory = program.memory_analysis()
    return {
        "compile_s": round(time.perf_counter() - begun, 1),
        "collectives": collectives(text),
        "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 3),
        "temporaries_gb": round(memory.temp_size_in_bytes / 1e9, 3),
    }


def collectives(text: str) -> dict[str, int]:
    return dict(collections.Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)))


def training_step(size, layers, batch_size, tokens, remat, distribution):
    """A step of AdamW on packed rows under `mixed_bfloat16`, and its arguments' shapes."""
    workload = of_size(size, dtype="mixed_bfloat16", chunk_size=tpu_aot.CHUNK_SIZE)
    lm = abstract_model(workload, num_layers=layers or workload.num_layers, remat=remat)
    optimizer = adamw_recipe(1e-3, steps=1000)
    with deferred_initialization():
        for variable in lm.trainable_variables:
            variable._layout = distribution.get_variable_layout(variable)
        optimizer.build(lm.trainable_variables)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss(trainable, non_trainable, x, y):
        logits, non_trainable = lm.stateless_call(trainable, non_trainable, x, training=True)
        return cross_entropy(y, logits), non_trainable

    def step(trainable, non_trainable, optimizer_variables, x, y):
        gradients, non_trainable = jax.grad(loss, has_aux=True)(trainable, non_trainable, x, y)
        trainable, optimizer_variables = optimizer.stateless_apply(
            optimizer_variables, gradients, trainable
        )
        return trainable, non_trainable, optimizer_variables

    def shape(variable):
        layout = variable._layout or distribution.get_variable_layout(variable)
        return jax.ShapeDtypeStruct(
            tuple(variable.shape), jax.numpy.dtype(variable.dtype), sharding=layout.backend_layout
        )

    sharding = distribution.get_data_layout((batch_size, tokens)).backend_layout
    ids = jax.ShapeDtypeStruct((batch_size, tokens), jax.numpy.int32, sharding=sharding)
    variables = (lm.trainable_variables, lm.non_trainable_variables, optimizer.variables)
    weights = [[shape(variable) for variable in group] for group in variables]
    return step, (*weights, {"token_ids": ids, "padding_mask": ids}, ids)


if __name__ == "__main__":
    typer.run(main)
