"""Compiles prefill and the decode loop for a TPU, without one: `python -m benchmarks.tpu_aot`.

The compiler is the real one, of `libtpu`. It needs shapes and no weights. It tells operations,
bytes and memory of the program, and the program itself as it is scheduled; times in seconds only
a TPU can tell, and what is called an estimate here is arithmetic with published rates.

Of bytes there are two counts. What the compiler calls accessed counts every buffer that an
instruction reads or writes, those on the chip too, and the body of a loop once. The traffic with
HBM is counted here from the scheduled program, by the memory that each buffer lives in, and with
a loop's body as often as it runs: see `hlo.py`. Of operations there are two counts in the same way.
"""

import functools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated
from typing import Any

# Before JAX is imported.
os.environ |= {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # There is no chip to share, only a lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import typer
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jax.stages import Traced

from benchmarks.checkpoint import hugging_face_names
from benchmarks.hlo import Module
from benchmarks.programs import abstract_model
from benchmarks.programs import decode_program
from benchmarks.programs import prefill_program
from benchmarks.programs import product_flops
from benchmarks.report import number
from benchmarks.report import write_table
from benchmarks.workload import SIZES
from benchmarks.workload import Workload
from benchmarks.workload import of_size

TOPOLOGY = "v6e:2x2x1"  # the smallest there is; programs are compiled for one chip of it
CHUNK_SIZE = 256
OURS, PEER = "keras_mamba2", "mamba2-jax"
# Published, of one v6e chip: https://docs.cloud.google.com/tpu/docs/v6e
MATRIX_FLOP_PER_S, HBM_BYTES_PER_S = 918e12, 1640e9
MEMORY_GB = {"v6e": 32, "v5e": 16}


def main(
    size: Annotated[list[str], typer.Option(help="repeatable")] = tuple(SIZES),
    batch_size: Annotated[list[int], typer.Option(help="of decoding; repeatable")] = (1, 64),
    prefill_tokens: Annotated[int, typer.Option(help="in one block")] = 2048,
    subject: Annotated[list[str], typer.Option(help="repeatable")] = (OURS, PEER),
    layers: Annotated[int | None, typer.Option(help="of each size the first so many")] = None,
    chunk_size: Annotated[int, typer.Option(help="of SSD, in ours")] = CHUNK_SIZE,
    file: Annotated[Path, typer.Option()] = Path(__file__).parent / "results" / "tpu_aot.json",
):
    """Compiles all sizes; writes what the compiler says to a JSON file and the README's table."""
    packages = {"jax", "libtpu", "keras", *subject} - {OURS}
    versions = {name: metadata.version(name) for name in sorted(packages)}
    found = {"date": datetime.now(UTC).date().isoformat(), "versions": versions, "programs": []}
    file.parent.mkdir(parents=True, exist_ok=True)
    for who in subject:
        for name in size:
            workload = of_size(name, dtype="bfloat16", chunk_size=chunk_size)
            workload = replace(workload, num_layers=layers or workload.num_layers)
            for kind, b, traced in programs(who, workload, batch_size, prefill_tokens):
                row = {"subject": who, "size": name, "program": kind, "batch_size": b}
                row["tokens"] = b if kind == "decode" else prefill_tokens
                row |= describe(traced, in_loop=who == OURS and kind == "decode")
                row |= compare(row, workload)
                print(json.dumps(row), flush=True)
                found["programs"].append(row)
                file.write_text(json.dumps(found, indent=2) + "\n")
    write_table(table(found["programs"]), file.resolve().parents[1] / "README.md", "tpu")


def table(rows: list[dict[str, Any]]) -> str:
    """A line a program; of the peer only what is compared."""
    lines = [
        "| | HBM, GB | at least | of mamba2-jax | accessed, GB | of mamba2-jax | GFLOP "
        "| temporaries, GB | peak, GB | fits | estimate, at best |",
        "| --- |" + " --- |" * 10,
    ]
    peers = {(r["size"], r["program"], r["batch_size"]): r for r in rows if r["subject"] == PEER}
    for row in (row for row in rows if row["subject"] == OURS):
        peer = peers.get((row["size"], row["program"], row["batch_size"]), {})
        what = f"batch {row['batch_size']}" if row["program"] == "decode" else row["tokens"]
        shares = [
            f"{row[key] / peer[key]:.0%}" if peer else "" for key in ("hbm_gb", "gb_accessed")
        ]
        cells = [
            f"{row['size'].upper()} {row['program']}, {what}",
            number(row["hbm_gb"]),
            number(row["least_gb"]),
            shares[0],
            number(row["gb_accessed"]),
            shares[1],
            number(row["gflop"] if row["program"] == "decode" else row["product_gflop"]),
            number(row["temporaries_gb"]),
            number(row["peak_gb"]),
            ", ".join(row["fits"]),
            f"{row['estimated_tokens_per_s_at_most']:,} tokens/s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def programs(
    subject: str, workload: Workload, batch_sizes: list[int], prefill_tokens: int
) -> Iterator[tuple[str, int, Traced]]:
    """The programs of a subject: what they do, the batch size, the program."""
    if subject == OURS:
        lm = abstract_model(workload)
        for b in batch_sizes:
            yield "decode", b, decode_program(lm, b, on_tpu)
        yield "prefill", 1, prefill_program(lm, 1, prefill_tokens, on_tpu)
    else:
        for b in batch_sizes:
            yield "decode", b, peer_program(workload, b, 1)
        yield "prefill", 1, peer_program(workload, 1, prefill_tokens)


def peer_program(workload: Workload, batch_size: int, tokens: int) -> Traced:
    """mamba2-jax: one call, of one token with a cache or of a prompt; greedy, as `adapters.py`."""
    import mamba2_jax
    from flax import nnx
    from mamba2_jax.modeling import create_empty_cache

    config = mamba2_jax.Mamba2Config(**hugging_face_names(workload))
    model = nnx.eval_shape(lambda: mamba2_jax.create_random_model(config))
    graph, weights = nnx.split(model)
    cache = jax.eval_shape(lambda: create_empty_cache(config, batch_size))

    def forward(weights, token_ids, cache):
        output = nnx.merge(graph, weights)(token_ids, cache=cache)
        return jax.numpy.argmax(output["logits"][:, -1:], axis=-1), output["cache"]

    return jax.jit(forward, donate_argnums=2).trace(
        jax.tree.map(lambda leaf: on_tpu(leaf.shape, workload.dtype), weights),
        on_tpu((batch_size, tokens), "int32"),
        jax.tree.map(lambda leaf: on_tpu(leaf.shape, leaf.dtype), cache) if tokens == 1 else None,
    )


@functools.cache
def one_chip() -> NamedSharding:
    topology = topologies.get_topology_desc(topology_name=TOPOLOGY, platform="tpu")
    return NamedSharding(jax.sharding.Mesh(topology.devices[:1], ("x",)), PartitionSpec())


def on_tpu(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype), sharding=one_chip())


def describe(traced: Traced, in_loop: bool) -> dict[str, Any]:
    """What the compiler says of a program; traffic and operations of a loop are of one step."""
    begun = time.perf_counter()
    program, module = compile_and_read(traced)
    seconds = time.perf_counter() - begun
    cost, memory = program.cost_analysis(), program.memory_analysis()
    loops = module.loops()
    part = loops[-1].called[0] if in_loop else module.entry  # the outer one of several
    traffic = module.traffic(part)
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "compile_s": round(seconds, 1),
        "gflop": round(cost["flops"] / 1e9, 2),
        "product_gflop": round(product_flops(traced.jaxpr.jaxpr) / 1e9, 2),
        "gb_accessed": round(cost["bytes accessed"] / 1e9, 3),
        "hbm_gb": round(sum(n for n, _ in traffic) / 1e9, 3),
        "most_traffic": {i.name: round(n / 1e9, 4) for n, i in traffic[:3]},
        "arguments_gb": round(arguments / 1e9, 3),
        "aliased_gb": round(memory.alias_size_in_bytes / 1e9, 3),
        "temporaries_gb": round(temporaries / 1e9, 3),
        "peak_gb": round((arguments + temporaries + results) / 1e9, 3),
        "operations": len(list(module.walk(part))),
        "loops": len(loops),
        "host_transfers": module.host_transfers(),
    }


def compile_and_read(traced: Traced) -> tuple[jax.stages.Compiled, Module]:
    """The program, and what is scheduled."""
    program, text = compile_and_dump(traced)
    return program, Module(text)


def compile_and_dump(traced: Traced) -> tuple[jax.stages.Compiled, str]:
    """The program, and its text as it is scheduled.

    `as_text()` cannot read back a program with an asynchronous gather (jax 0.10.2), so the
    compiler writes the text itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        program = traced.lower().compile(compiler_options=options)
        (text,) = Path(folder).glob("*.after_codegen.txt")
        return program, text.read_text()


def compare(row: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """With what has to be done, and what a chip can do at best."""
    tokens, least = row["tokens"], workload.decode_bytes(row["batch_size"])
    if row["program"] == "decode":
        by_hand, gflop = {}, row["gflop"]
    else:
        by_hand = {"gflop_by_hand": round(workload.prefill_flops(tokens) / 1e9, 2)}
        gflop = max(row["gflop"], row["product_gflop"])
    seconds = max(gflop * 1e9 / MATRIX_FLOP_PER_S, row["hbm_gb"] * 1e9 / HBM_BYTES_PER_S)
    return by_hand | {
        "least_gb": round(least / 1e9, 3),
        "estimated_ms_at_least": round(1e3 * seconds, 3),
        "estimated_tokens_per_s_at_most": round(tokens / seconds),
        "fits": [chip for chip, gb in MEMORY_GB.items() if row["peak_gb"] < gb],
    }


if __name__ == "__main__":
    typer.run(main)
