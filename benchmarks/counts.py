"""Counts that do not depend on the machine, against recorded ones: `python -m benchmarks.counts`.

Small programs are compiled for a CPU and not run:

    flops             of the program as it is lowered, before the compiler sees it
    argument_bytes    of weights, state and inputs
    bytes_accessed    of the compiled program, by XLA's own count
    temporary_bytes   that it holds besides arguments and results
    loops             `while` operations in it
    operations        kernels in one run of the decode loop's body
    compilations      in a set of calls of `generate`, of programs of any kind

A loop's body counts once. The first two are the same wherever JAX is the same. The others are the
compiler's, and were the same with one core or two, and with SSE4.2, AVX2 or AVX-512; they may
grow by a few percent all the same. Another version of JAX than the recorded one lowers and fuses
in other ways: then everything may grow by a quarter, and less is no news.
"""

import json
import os
from pathlib import Path
from typing import Annotated
from typing import Any

# Before JAX is imported.
os.environ |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}

import jax
import keras
import numpy as np
import typer
from jax.stages import Lowered

import keras_mamba2
from benchmarks.hlo import Module
from benchmarks.programs import decode_program
from benchmarks.programs import prefill_program
from keras_mamba2.ops import ssd

RECORDED = Path(__file__).parent / "results" / "counts.json"
UPDATE = "python -m benchmarks.counts --update"
# By how much a count may grow before it is a regression, or fall before it is to be recorded.
TOLERANCES = {
    "flops": 0.0,
    "argument_bytes": 0.0,
    "bytes_accessed": 0.03,
    "temporary_bytes": 0.03,
    "loops": 0.0,
    "operations": 0.03,
    "compilations": 0.0,
}
OTHER_JAX_TOLERANCE = 0.25
Counts = dict[str, dict[str, int]]

MODEL = {
    "vocabulary_size": 512,
    "num_layers": 2,
    "hidden_dim": 64,
    "state_dim": 32,
    "head_dim": 16,
    "num_groups": 2,
    "chunk_size": 64,
}
BATCH, TOKENS = 2, 256


def main(
    update: Annotated[bool, typer.Option(help="record what was counted")] = False,
    file: Annotated[Path, typer.Option(help="of the recorded counts")] = RECORDED,
):
    """Compares with the recorded counts, and fails where they differ."""
    found = {"jax": jax.__version__, "counts": measure()}
    if update:
        file.write_text(json.dumps(found, indent=2) + "\n")
    else:
        differences = compare(found, json.loads(file.read_text()))
        print("\n".join(differences or ["as recorded"]))
        raise SystemExit(bool(differences))


def compare(found: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """What differs from the recorded counts, in words; nothing if nothing does."""
    same_jax, differences = found["jax"] == recorded["jax"], []
    old, new = (
        {(p, k): n for p, of in side["counts"].items() for k, n in of.items()}
        for side in (recorded, found)
    )
    for (program, key), before in old.items():
        after = new.get((program, key))
        tolerance = TOLERANCES[key] if same_jax else OTHER_JAX_TOLERANCE
        if after is None:
            differences.append(f"{program}: {key} is no longer counted")
        elif after > before * (1 + tolerance):
            differences.append(f"{program}: {key} grew from {before:,} to {after:,}")
        elif same_jax and after < before * (1 - tolerance):
            differences.append(
                f"{program}: {key} fell from {before:,} to {after:,}, an improvement"
            )
    differences += [f"{program}: {key} is not recorded" for program, key in new.keys() - old.keys()]
    if differences:
        versions = "" if same_jax else f"Recorded with jax {recorded['jax']}, not {found['jax']}. "
        differences.append(f"{versions}If this is meant, record it: {UPDATE}")
    return differences


def measure() -> Counts:
    lm = keras_mamba2.Mamba2CausalLM(keras_mamba2.Mamba2Backbone(**MODEL))
    lm.compile(sampler="greedy", optimizer="adamw", loss="sparse_categorical_crossentropy")
    # First, since what is made before `generate` would be compiled already.
    compilations = count_compilations(lm)
    decode = decode_program(lm, BATCH, jax.ShapeDtypeStruct).lower()
    return {
        "ssd": counts(jax.jit(ssd_output).lower(*ssd_arguments())),
        "ssd gradient": counts(jax.jit(jax.grad(ssd_sum, range(5))).lower(*ssd_arguments())),
        "training step": counts(training_step(lm)),
        "prefill": counts(prefill_program(lm, BATCH, TOKENS, jax.ShapeDtypeStruct).lower()),
        "decode": counts(decode) | {"operations": operations_in_loop(decode)},
        "generate": {"compilations": compilations},
    }


def counts(lowered: Lowered) -> dict[str, int]:
    program = lowered.compile()
    memory = program.memory_analysis()
    return {
        "flops": int(lowered.cost_analysis()["flops"]),
        "argument_bytes": memory.argument_size_in_bytes,
        "bytes_accessed": int(program.cost_analysis()["bytes accessed"]),
        "temporary_bytes": memory.temp_size_in_bytes,
        "loops": len(Module(program.as_text()).loops()),
    }


def operations_in_loop(lowered: Lowered) -> int:
    module = Module(lowered.compile().as_text())
    (loop,) = module.loops()
    return len(list(module.walk(loop.called[0])))


def ssd_arguments() -> list[jax.ShapeDtypeStruct]:
    b, t, h, p, g, n = BATCH, TOKENS, 8, 16, 2, 32
    shapes = [(b, t, h, p), (b, t, h), (h,), (b, t, g, n), (b, t, g, n)]
    return [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]


def ssd_output(*arguments):
    return ssd(*arguments, chunk_size=MODEL["chunk_size"])


def ssd_sum(*arguments):
    return jax.numpy.sum(ssd_output(*arguments)[0])


def training_step(lm: keras_mamba2.Mamba2CausalLM) -> Lowered:
    """What `fit` compiles, for one batch."""
    lm.optimizer.build(lm.trainable_variables)
    ids = jax.ShapeDtypeStruct((BATCH, TOKENS), "int32")
    state = [
        [v.value for v in variables]
        for variables in (
            lm.trainable_variables,
            lm.non_trainable_variables,
            lm.optimizer.variables,
            lm.metrics_variables,
        )
    ]
    inputs = {"token_ids": ids, "padding_mask": jax.ShapeDtypeStruct((BATCH, TOKENS), "bool")}
    return jax.jit(lm.train_step, donate_argnums=0).lower(state, (inputs, ids, None))


def count_compilations(lm: keras_mamba2.Mamba2CausalLM) -> int:
    """Of 36 calls: twelve lengths of a prompt, each with three numbers of new tokens."""
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for length in (1, 2, 3, 7, 8, 9, 63, 65, 100, 300, 511, 700):
        for new in (1, 5, 300):
            prompt = np.ones((1, length), "int32")
            inputs = {"token_ids": prompt, "padding_mask": np.ones_like(prompt)}
            lm.generate(inputs, max_new_tokens=new, stop_token_ids=None)
    jax.monitoring.unregister_event_duration_listener(listen)
    return len(compiled)


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    typer.run(main)
