"""Hybrids at their real sizes beside their peers, on a CPU: `python -m benchmarks.hybrids`.

transformers makes a model of a preset's configuration with random weights and saves it. All load
these weights in float32; llama.cpp, where it is installed, from a GGUF file. They are measured by
turns in one process, so that what disturbs the machine disturbs all. A figure is the median of the
rounds.
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
from importlib.util import find_spec
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
OURS = "keras_mamba2"
SHORT_PROMPT = 32  # of decoding


def main(
    preset: Annotated[list[str], typer.Option(help="repeatable")] = PRESETS,
    prompt_tokens: Annotated[int, typer.Option(help="of the prefill")] = 512,
    new_tokens: Annotated[int, typer.Option(help="of decoding, after a prompt of 32")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    file: Annotated[Path, typer.Option()] = Path(__file__).parent / "results" / "hybrids_cpu.json",
):
    """Measures decoding and prefill, one row, and writes all figures and ratios to each peer."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    if has_llama_cpp():
        versions["llama_cpp_python"] = metadata.version("llama_cpp_python")
    else:
        print("without llama.cpp, which is not installed", flush=True)
    found = {"date": datetime.now(UTC).date().isoformat(), "versions": versions, "presets": {}}
    for name in preset:
        with tempfile.TemporaryDirectory() as folder:
            save_random_model(name, folder)
            figures = measure(folder, prompt_tokens, new_tokens, rounds)
        found["presets"][name] = figures
        for what, values in figures.items():
            print(name, what, json.dumps(values), flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


def save_random_model(name: str, folder: str) -> None:
    config = transformers.AutoConfig.from_pretrained(Preset(name).folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)


def measure(folder: str, prompt_tokens: int, new_tokens: int, rounds: int):
    """Seconds of a prefill and of a decoded token, of each, and how many times as fast we are."""
    subjects = {OURS: ours(folder), "transformers": theirs(folder)}
    if has_llama_cpp():
        subjects["llama.cpp"] = llama_cpp(folder, max(prompt_tokens, SHORT_PROMPT + new_tokens))
    rng = np.random.default_rng(0)
    most = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    long, short = (rng.integers(0, most, size=size) for size in (prompt_tokens, SHORT_PROMPT))
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
        values["ratio"] = {peer: values[peer] / values[OURS] for peer in subjects if peer != OURS}
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
        rows, *_ = generator.advance(generator.start([prompt], np.array([2])), 1)
        jax.block_until_ready(rows.remaining)

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


def has_llama_cpp() -> bool:
    return all(find_spec(name) for name in ("llama_cpp", "gguf"))


def llama_cpp(folder: str, max_tokens: int):
    from benchmarks.gguf_file import write_gguf
    from benchmarks.llama_cpp_model import LlamaCpp

    file = Path(folder) / "float32.gguf"
    write_gguf(Path(folder), file)
    model = LlamaCpp(file)

    def start() -> float:
        begun = time.perf_counter()
        model.start(1, max_tokens)
        return time.perf_counter() - begun

    def prefill(prompt):
        before = start()
        model.advance(prompt[None])
        return before

    def decode(prompt, count):
        begun = time.perf_counter()
        start()
        token = model.advance(prompt[None]).argmax(-1)[:, None]
        before = time.perf_counter() - begun
        for _ in range(count):
            token = model.advance(token).argmax(-1)[:, None]
        return before

    return prefill, decode


if __name__ == "__main__":
    typer.run(main)
