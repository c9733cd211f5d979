"""Hybrids at their real sizes beside transformers, on a CPU: `python -m benchmarks.hybrids`.

transformers makes a model of a preset's configuration with random weights and saves it, and both
libraries load these files, in float32. They are measured by turns in one process, so that what
disturbs the machine disturbs both. A figure is the median of the rounds.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated

os.environ |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}

import jax
import numpy as np
import torch
import transformers
import typer

import keras_mamba2
from keras_mamba2.preset_files import Preset

PRESETS = ("granite_4.0_h_350m", "falcon_h1_0.5b")
PACKAGES = ("keras", "jax", "torch", "transformers")


def main(
    preset: Annotated[list[str], typer.Option(help="repeatable")] = PRESETS,
    prompt_tokens: Annotated[int, typer.Option(help="of the prefill")] = 512,
    new_tokens: Annotated[int, typer.Option(help="of decoding, after a prompt of 32")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    file: Annotated[Path, typer.Option()] = Path(__file__).parent / "results" / "hybrids_cpu.json",
):
    """Measures decoding and prefill, one row, and writes both figures and their ratio."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    found = {"date": datetime.now(UTC).date().isoformat(), "versions": versions, "presets": {}}
    for name in preset:
        with tempfile.TemporaryDirectory() as folder:
            save_random_model(name, folder)
            figures = measure(folder, prompt_tokens, new_tokens, rounds)
        found["presets"][name] = figures
        for what, values in figures.items():
            print(name, what, {key: round(value, 4) for key, value in values.items()}, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


def save_random_model(name: str, folder: str) -> None:
    config = transformers.AutoConfig.from_pretrained(Preset(name).folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)


def measure(folder: str, prompt_tokens: int, new_tokens: int, rounds: int):
    """Seconds of a prefill and of a decoded token, of both, and how many times as fast we are."""
    subjects = {"keras_mamba2": ours(folder), "transformers": theirs(folder)}
    rng = np.random.default_rng(0)
    long, short = rng.integers(100, 1000, size=prompt_tokens), rng.integers(100, 1000, size=32)
    seconds: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
    for i in range(rounds + 1):  # the first warms up
        for subject, (prefill, decode) in subjects.items():
            figures = {"prefill": timed(prefill, long), "decode": timed(decode, short, new_tokens)}
            if i:
                for what, value in figures.items():
                    seconds[what].setdefault(subject, []).append(value)
    medians = {
        what: {subject: statistics.median(values) for subject, values in by_subject.items()}
        for what, by_subject in seconds.items()
    }
    medians["decode"] = {key: value / new_tokens for key, value in medians["decode"].items()}
    for values in medians.values():
        values["ratio"] = values["transformers"] / values["keras_mamba2"]
    return medians


def timed(function: Callable[..., float | None], *arguments) -> float:
    """The seconds of a call, less those that it says belong to something else."""
    start = time.perf_counter()
    other = function(*arguments) or 0.0
    return time.perf_counter() - start - other


def ours(folder: str):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder, preprocessor=None)
    lm.compile(sampler="greedy")
    generator = lm.make_generate_function()

    def prefill(prompt):
        jax.block_until_ready(generator.prefill([prompt]).layers)

    def decode(prompt, count):
        start = time.perf_counter()
        rows = generator.start([prompt], np.array([count]))
        jax.block_until_ready(rows.state.layers)
        before = time.perf_counter() - start
        generator.decode(rows).all_tokens()
        return before

    return prefill, decode


def theirs(folder: str):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def prefill(prompt):
        model(torch.from_numpy(prompt[None]), use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def decode(prompt, count):
        ids = torch.from_numpy(prompt[None])
        options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=1, min_new_tokens=1, **options)
        before = time.perf_counter() - start
        model.generate(ids, max_new_tokens=count + 1, min_new_tokens=count + 1, **options)
        return 2 * before

    return prefill, decode


if __name__ == "__main__":
    typer.run(main)
