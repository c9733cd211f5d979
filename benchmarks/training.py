"""Measures a training step beside peers: `python -m benchmarks.training`.

One step of AdamW on one row of tokens, float32, at the shapes of Mamba-2 130M: tokens a second,
their share of the matrix rate measured in the same round, and peak memory above the imports, each
subject in a process of its own, by turns, at each of a few chunk sizes. Ratios are taken at
everyone's best. Where tcmalloc is installed all run with it: XLA and torch give the memory of a
step back to the system, and half of the next is page faults.
"""

import functools
import json
import math
import os
import subprocess
from collections.abc import Callable
from ctypes.util import find_library
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated
from typing import Any

import numpy as np
import typer
from tqdm import tqdm

from benchmarks.checkpoint import hugging_face_names
from benchmarks.report import MACHINE
from benchmarks.report import OURS
from benchmarks.report import number
from benchmarks.report import write_table
from benchmarks.rounds import ENVIRONMENT
from benchmarks.rounds import HERE
from benchmarks.rounds import describe_run
from benchmarks.rounds import module
from benchmarks.rounds import run_subject
from benchmarks.subject import median_seconds
from benchmarks.subject import process_peak_mb
from benchmarks.workload import FULL
from benchmarks.workload import QUICK
from benchmarks.workload import Workload

LEARNING_RATE = 1e-4


def main(
    subject: Annotated[str | None, typer.Option(help="measured in this process")] = None,
    chunk_size: Annotated[list[int], typer.Option(help="repeatable")] = (64, 256),
    tokens: int = 2048,
    rounds: int = 2,
    quick: Annotated[bool, typer.Option(help="tiny shapes")] = False,
    file: Annotated[Path, typer.Option()] = HERE / "results" / "training.json",
):
    """Writes a JSON file and the README's table; with `--subject` prints what that one measured."""
    if subject is not None:
        os.environ |= ENVIRONMENT
        print(json.dumps(measure(subject, tokens, chunk_size[0], quick)))
        return
    allocator = find_library("tcmalloc_minimal")
    results = describe_run() | {"tokens": tokens, "allocator": allocator}
    results["rounds"] = [{} for _ in range(rounds)]
    file.parent.mkdir(parents=True, exist_ok=True)
    plan = [(r, s, q) for r in results["rounds"] for s in SUBJECTS for q in chunk_size]
    size = ["--quick"] if quick else []
    for found, name, q in (progress := tqdm(plan, unit="subject")):
        progress.set_postfix_str(f"{name}, chunks of {q}")
        if MACHINE not in found:
            found[MACHINE] = run_subject([MACHINE, "--batch-size=1", *size])
        options = [f"--subject={name}", f"--chunk-size={q}", f"--tokens={tokens}", *size]
        done = subprocess.run(
            [*module("training"), *options],
            cwd=HERE.parent,
            env=os.environ | {"LD_PRELOAD": allocator or "", "TCMALLOC_RELEASE_RATE": "0"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found.setdefault(name, {})[q] = json.loads(done.stdout.splitlines()[-1])
        file.write_text(json.dumps(results, indent=2) + "\n")
    write_table(
        table(json.loads(file.read_text())), file.resolve().parents[1] / "README.md", "train"
    )


def table(results: dict[str, Any]) -> str:
    lines = [
        "| training step | chunk | tokens/s | times ours | of the matrix rate "
        "| peak memory above imports, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    best = {name: best_of(results["rounds"], name) for name in SUBJECTS}
    for name, (chunk, tokens_per_s, peak_mb) in best.items():
        ratio = np.median(
            [fastest(found[OURS]) / fastest(found[name]) for found in results["rounds"]]
        )
        share = np.median(
            [
                found[name][chunk]["gflop_per_s"] / found[MACHINE]["matmul_gflop_per_s"]
                for found in results["rounds"]
            ]
        )
        cells = [name, chunk, number(tokens_per_s), f"{ratio:.2f}x", f"{share:.0%}"]
        cells.append(number(peak_mb))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fastest(by_chunk: dict[str, dict[str, float]]) -> float:
    return max(found["tokens_per_s"] for found in by_chunk.values())


def best_of(rounds: list[dict[str, Any]], name: str) -> tuple[str, float, float]:
    """The best chunk size of a subject, and the medians of its figures there."""

    def median(chunk: str, key: str) -> float:
        return float(np.median([found[name][chunk][key] for found in rounds]))

    chunk = max(rounds[0][name], key=lambda chunk: median(chunk, "tokens_per_s"))
    return chunk, median(chunk, "tokens_per_s"), median(chunk, "peak_mb")


def measure(name: str, tokens: int, chunk_size: int, quick: bool) -> dict[str, float]:
    workload = replace(QUICK if quick else FULL, chunk_size=chunk_size, budget_s=math.inf)
    token_ids = np.random.default_rng(0).integers(0, workload.vocabulary_size, (1, tokens + 1))
    packages, make_step = SUBJECTS[name]
    for package in packages:
        import_module(package)
    before = process_peak_mb()
    step = make_step(workload, token_ids.astype("int32"))
    losses = []
    seconds = median_seconds(lambda: losses.append(step()), workload)
    assert losses[-1] < losses[0], losses  # it learns the row
    return {
        "tokens_per_s": tokens / seconds,
        # In chunks of 64 for everyone: larger ones are more work for the same result.
        "gflop_per_s": replace(workload, chunk_size=64).training_flops(tokens) / 1e9 / seconds,
        "peak_mb": process_peak_mb() - before,
    }


def keras_mamba2_step(workload: Workload, token_ids: np.ndarray) -> Callable[[], float]:
    keras, keras_mamba2 = import_module("keras"), import_module("keras_mamba2")
    arguments = {**workload.model, "chunk_size": workload.chunk_size}
    lm = keras_mamba2.Mamba2CausalLM(keras_mamba2.Mamba2Backbone(**arguments))
    lm.compile(optimizer=keras.optimizers.AdamW(LEARNING_RATE), weighted_metrics=[])
    x = {"token_ids": token_ids[:, :-1], "padding_mask": np.ones_like(token_ids[:, 1:])}
    return lambda: float(lm.train_on_batch(x, token_ids[:, 1:]))


def transformers_step(workload: Workload, token_ids: np.ndarray) -> Callable[[], float]:
    torch, transformers = import_module("torch"), import_module("transformers")
    config = transformers.Mamba2Config(
        num_heads=workload.num_heads,
        n_groups=1,
        tie_word_embeddings=True,
        chunk_size=workload.chunk_size,
        use_cache=False,
        **hugging_face_names(workload),
    )
    model = transformers.Mamba2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    token_ids = torch.from_numpy(token_ids).long()

    def step() -> float:
        optimizer.zero_grad()
        logits = model(token_ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def mamba2_jax_step(workload: Workload, token_ids: np.ndarray) -> Callable[[], float]:
    mamba2_jax, nnx, optax = map(import_module, ("mamba2_jax", "flax.nnx", "optax"))
    names = hugging_face_names(workload) | {"chunk_size": workload.chunk_size}
    model = mamba2_jax.create_random_model(mamba2_jax.Mamba2Config(**names))
    optimizer = nnx.Optimizer(model, optax.adamw(LEARNING_RATE), wrt=nnx.Param)

    def loss(model):
        logits = model(token_ids[:, :-1])["logits"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, token_ids[:, 1:])
        return losses.mean()

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    step = functools.partial(step, model, optimizer)
    return lambda: float(step())


SUBJECTS = {
    OURS: (("jax", "keras", "keras_mamba2"), keras_mamba2_step),
    "transformers": (("torch", "transformers"), transformers_step),
    "mamba2-jax": (("jax", "mamba2_jax", "optax"), mamba2_jax_step),
}


if __name__ == "__main__":
    typer.run(main)
