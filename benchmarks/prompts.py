"""The time of a prompt over its length, on a CPU: `python -m benchmarks.prompts`.

130M with one set of random weights in float32: ours, and llama.cpp in bfloat16 where it is
installed, by turns in one process. A figure is the shortest of the rounds, which other work on the
machine has disturbed least: a plot is for its shape.
"""

import json
import os
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

os.environ |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}

import typer
from tqdm import tqdm

from benchmarks import checkpoint
from benchmarks.adapters import ADAPTERS
from benchmarks.report import HERE
from benchmarks.report import OURS
from benchmarks.rounds import describe_run
from benchmarks.subject import random_prompt
from benchmarks.subject import seconds
from benchmarks.workload import FULL
from benchmarks.workload import QUICK

PEER = "llama.cpp, bfloat16"


def main(
    longest: Annotated[int, typer.Option(min=1)] = 600,
    step: Annotated[int, typer.Option(min=1)] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    quick: Annotated[bool, typer.Option(help="tiny shapes, to try the command")] = False,
    folder: Annotated[Path, typer.Option()] = HERE / "results",
):
    """Writes prompts.json and prompts.png."""
    workload = QUICK if quick else FULL
    names = [OURS, *([PEER] if find_spec("llama_cpp") and find_spec("gguf") else [])]
    lengths = [1, *range(step, longest + 1, step)]
    with tempfile.TemporaryDirectory() as weights:
        checkpoint.main(Path(weights), json.dumps(vars(workload)))
        models = {}
        for name in names:
            adapter, dtype = ADAPTERS[name]
            models[name] = adapter(replace(workload, dtype=dtype or workload.dtype), Path(weights))
    found: dict[str, list[float]] = {name: [float("inf")] * len(lengths) for name in names}
    for _ in tqdm(range(1 + rounds), unit="round"):  # the first compiles
        for i, length in enumerate(lengths):
            prompt = random_prompt(workload, length)
            for name, model in models.items():
                taken = seconds(lambda model=model, prompt=prompt: model.prefill(prompt))
                found[name][i] = min(found[name][i], taken)
    folder.mkdir(parents=True, exist_ok=True)
    results = describe_run() | {"lengths": lengths, "seconds": found}
    (folder / "prompts.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(lengths, found, folder / "prompts.png")


def plot(lengths: list[int], found: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, taken in found.items():
        axes.plot(lengths, [1e3 * s for s in taken], "-" if name == OURS else "--", label=name)
    axes.set(xlabel="tokens of the prompt", ylabel="ms to the first token", xlim=0, ylim=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    typer.run(main)
