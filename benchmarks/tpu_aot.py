"""Compiles prefill and the decode loop for a TPU, without one: `python -m benchmarks.tpu_aot`.

The compiler is the real one, of `libtpu`. It needs shapes and no weights, and tells operations,
bytes and memory of the program; times in seconds only a TPU can tell. See README.md.
"""

import functools
import json
import os
import time
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated

# Before JAX is imported.
os.environ |= {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

import jax
import keras
import typer
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from keras.src.backend.common import global_state

import keras_mamba2
from benchmarks.programs import decode_program
from benchmarks.programs import prefill_program
from keras_mamba2.conversion import constructor_arguments
from keras_mamba2.preset_files import Preset

SIZES = ("130m", "370m", "780m", "1.3b", "2.7b")
TOPOLOGY = "v6e:2x2x1"  # the smallest there is; programs are compiled for one chip of it
CHUNK_SIZE = 256
# What a program does not do that stays on the device.
HOST_WORDS = ("infeed", "outfeed", "callback", "stablehlo.send", "stablehlo.recv", "host")


def main(
    size: Annotated[list[str], typer.Option(help="repeatable")] = SIZES,
    batch_size: Annotated[list[int], typer.Option(help="repeatable")] = (1, 64),
    prefill_tokens: Annotated[int, typer.Option(help="in one block")] = 2048,
    file: Annotated[Path, typer.Option()] = Path(__file__).parent / "results" / "tpu_aot.json",
):
    """Compiles all sizes, and writes what the compiler says to a JSON file."""
    versions = {name: metadata.version(name) for name in ("jax", "libtpu", "keras")}
    found = {"date": datetime.now(UTC).date().isoformat(), "versions": versions, "programs": []}
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in size:
        for b in batch_size:
            for kind, lowered in programs(f"mamba2_{name}_en", b, prefill_tokens):
                row = {"size": name, "batch_size": b, "program": kind, **compiled(lowered)}
                print(json.dumps(row), flush=True)
                found["programs"].append(row)
                file.write_text(json.dumps(found, indent=2) + "\n")


def programs(preset: str, batch_size: int, prefill_tokens: int):
    """Yields the programs of generation by name, lowered for a TPU, in bfloat16."""
    lm = abstract_model(preset)
    yield "decode", decode_program(lm, batch_size, on_tpu)
    if batch_size == 1:
        yield "prefill", prefill_program(lm, batch_size, prefill_tokens, on_tpu)


def abstract_model(preset: str) -> keras_mamba2.Mamba2CausalLM:
    """A model whose variables have shapes and no values: 2.7B would not fit everywhere."""
    arguments = constructor_arguments(Preset(preset).config)
    with keras.StatelessScope(initialize_variables=False):
        backbone = keras_mamba2.Mamba2Backbone(**arguments, chunk_size=CHUNK_SIZE, dtype="bfloat16")
    # Or the next scope that ends would give them values after all.
    global_state.set_global_attribute("uninitialized_variables", [])
    lm = keras_mamba2.Mamba2CausalLM(backbone)
    lm.compile(sampler="greedy")
    return lm


@functools.cache
def one_chip() -> NamedSharding:
    topology = topologies.get_topology_desc(topology_name=TOPOLOGY, platform="tpu")
    return NamedSharding(jax.sharding.Mesh(topology.devices[:1], ("x",)), PartitionSpec())


def on_tpu(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype), sharding=one_chip())


def compiled(lowered) -> dict:
    """What the compiler says of a program; bytes and operations of a loop are those of one step."""
    begun = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - begun
    cost, memory = program.cost_analysis(), program.memory_analysis()
    # Not the scheduled program's text: with asynchronous copies in it JAX 0.10 cannot read it back.
    text = lowered.as_text()
    return {
        "compile_s": round(seconds, 1),
        "gflop": round(cost["flops"] / 1e9, 2),
        "gb_accessed": round(cost["bytes accessed"] / 1e9, 3),
        "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 3),
        "aliased_gb": round(memory.alias_size_in_bytes / 1e9, 3),
        "temporaries_gb": round(memory.temp_size_in_bytes / 1e9, 3),
        "whiles": text.count("stablehlo.while"),
        "host_words": [word for word in HOST_WORDS if word in text],
    }


if __name__ == "__main__":
    typer.run(main)
