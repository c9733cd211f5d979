"""What speculation costs and gains: `python -m benchmarks.speculation`.

Random weights cannot show how often proposals of real text are accepted, so the parts are measured:

- `blocks`: the time of a round of t tokens, as a share of a step of plain decoding, on this CPU;
- `texts`: tokens a second on text that repeats itself, that copies its prompt, and that does
  neither, beside plain decoding, with a number of proposals that follows the acceptance;
- `equal`: how many of 10,000 tokens of the embedded preset differ from those of plain decoding;
- `acceptance`: how often proposals for real text are right. The embedded preset writes, and its own
  weights in int4 propose; a lookup proposes copies and edited copies of Shakespeare's text;
- `tpu`: bytes of HBM and operations of a round at 2.7B, from the program compiled for a v6e.

Each writes its part of `results/speculation.json`; `report` makes the README's table and the plot.
"""

import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import typer

from benchmarks.report import HERE
from benchmarks.report import write_table

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
FILE = HERE / "results" / "speculation.json"
TOKENS = (2, 4, 8, 16)  # of a block: the last token of the text, and the proposals
SHARED_TEXT = HERE.parents[1] / "shared" / "data" / "tinyshakespeare" / "input.txt"


@app.command()
def blocks(
    preset: Annotated[list[str], typer.Option(help="repeatable")] = (
        "mamba2_130m_en",
        "mamba2_370m_en",
    ),
    rounds: Annotated[int, typer.Option()] = 7,
    steps: Annotated[int, typer.Option(help="of a measurement")] = 16,
):
    """The time of a round by its number of tokens, in steps, by turns with plain decoding."""
    import keras_mamba2

    found = {}
    for name in preset:
        lm = compiled_model(name, "greedy", keras_mamba2.PromptLookup())
        runs = {t: run_of(lm, t, steps) for t in (1, *TOKENS)}
        seconds: dict[int, list[float]] = {t: [] for t in runs}
        for _ in range(rounds):
            for t, run in runs.items():
                seconds[t].append(run() / steps)
        for t in TOKENS:
            ratios = [a / b for a, b in zip(seconds[t], seconds[1], strict=True)]
            found[f"{name}, {t} tokens"] = round(statistics.median(ratios), 3)
        found[f"{name}, ms a step"] = round(1e3 * statistics.median(seconds[1]), 2)
        print(name, found, flush=True)
    keep("blocks", found)


@app.command()
def texts(
    preset: Annotated[str, typer.Option()] = "mamba2_130m_en",
    tokens: Annotated[int, typer.Option()] = 512,
    rounds: Annotated[int, typer.Option()] = 3,
    only: Annotated[str | None, typer.Option(help="one of the texts, by its name")] = None,
    file: Annotated[Path, typer.Option(help="tiny Shakespeare")] = SHARED_TEXT,
):
    """Tokens a second of a lookup over those of plain decoding."""
    import keras_mamba2

    found = json.loads(FILE.read_text()).get("texts", {}) if FILE.exists() else {}
    for what, (prompt, sampler, prepare) in texts_to_write(file.read_text(), tokens).items():
        if only not in (None, what):
            continue
        models = {
            "plain": compiled_model(preset, sampler),
            "lookup": compiled_model(preset, sampler, keras_mamba2.PromptLookup()),
        }
        seconds: dict[str, list[float]] = {who: [] for who in models}
        for lm in models.values():
            prepare(lm)
            generate(lm, prompt, tokens)  # compiles
        for _ in range(rounds):
            for who, lm in models.items():
                seconds[who].append(seconds_to_decode(lm, prompt, tokens))
        ratios = [a / b for a, b in zip(seconds["plain"], seconds["lookup"], strict=True)]
        found[what] = round(statistics.median(ratios), 3)
        print(what, found[what], flush=True)
        keep("texts", found)


def texts_to_write(text: str, tokens: int) -> dict[str, tuple[np.ndarray, Any, Any]]:
    """By their names: a prompt, a sampler, and what is done to the weights."""
    piece = text[-100_000:][: 2 * tokens]
    copy = np.frombuffer(piece[:tokens].encode(), np.uint8).astype("int32")
    edit = piece.replace("your", "thy").replace("you", "thou")[:tokens]
    edit = np.frombuffer(edit.encode(), np.uint8).astype("int32")
    few = np.arange(100, 132)
    return {
        "repeats one token": (few, "greedy", repeat_the_last_token),
        "copies its prompt": (copy, written(copy, copy), unchanged),
        "edits its prompt": (copy, written(copy, edit), unchanged),
        "does not repeat": (few, "random", unchanged),
    }


def written(prompt: np.ndarray, output: np.ndarray):
    """A sampler that picks the tokens of `output` after `prompt`, whatever their probabilities.

    With random weights no text repeats its prompt. The model does all of its work, and the text
    is one that was written before.
    """
    import keras
    import keras_hub
    from keras import ops

    from keras_mamba2.state.digest import digest_after

    text = np.concatenate([prompt, output])[None]
    ends = range(len(prompt), text.shape[1])
    digests = np.array([digest_after(np.zeros(1, "int32"), text[:, :i])[0] for i in ends])
    order = np.argsort(digests)

    class Written(keras_hub.samplers.Sampler):
        """The random numbers of a token are told the text before it, by its digest."""

        def __init__(self):
            super().__init__()
            self.place = keras.random.SeedGenerator(0)

        def get_next_token(self, probabilities):
            digest = ops.cast(self.place.state[1], "int32")
            place = ops.searchsorted(digests[order], digest[None])
            token = ops.take(output[order], ops.minimum(place, len(output) - 1))
            # Asks for the probabilities, or the model would not be run.
            return token + ops.cast(probabilities[:, 0] > 1, "int32")

    return Written()


@app.command()
def equal(
    file: Annotated[Path, typer.Option(help="tiny Shakespeare")] = SHARED_TEXT,
    pieces: Annotated[int, typer.Option()] = 25,
    tokens: Annotated[int, typer.Option(help="of each text")] = 400,
):
    """How many tokens of the embedded preset are others than those of plain decoding."""
    import keras_mamba2

    text = file.read_text()[-100_000:]
    starts = np.linspace(0, len(text) - 2000, pieces).astype(int)
    draft = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")
    draft.quantize("int4")
    proposers = {
        "lookup": keras_mamba2.PromptLookup(3),
        "int4 draft": keras_mamba2.DraftModel(draft, 3),
    }
    lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")
    prompts = lm.preprocessor.prompts([text[i : i + 200] for i in starts])
    found = {"of": pieces * tokens}
    for how, sampler in (
        ("greedy", "greedy"),
        ("temperature 0.9", keras_mamba2.FilterSampler(temperature=0.9)),
    ):
        lm.compile(sampler=sampler)
        truth = decoded(lm, prompts, tokens)
        for who, proposer in proposers.items():
            lm.compile(sampler=sampler, speculation=proposer)
            found[f"{who}, {how}"] = int(np.sum(decoded(lm, prompts, tokens) != truth))
            print(found, flush=True)
    keep("equal", found)


@app.command()
def acceptance(
    file: Annotated[Path, typer.Argument(help="tiny Shakespeare")] = SHARED_TEXT,
    pieces: Annotated[int, typer.Option()] = 20,
):
    """How often a proposal is right, if those before it were."""
    import keras_mamba2

    text = file.read_text()[-100_000:]
    starts = np.linspace(0, len(text) - 2000, pieces).astype(int)
    found = {}
    for name, sampler in (
        ("greedy", "greedy"),
        ("temperature 0.8", keras_mamba2.FilterSampler(temperature=0.8, top_p=0.95)),
    ):
        draft = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")
        draft.quantize("int4")
        lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")
        lm.compile(sampler=sampler, speculation=keras_mamba2.DraftModel(draft, 4))
        generator = lm.make_generate_function()
        prompts = lm.preprocessor.prompts([text[i : i + 200] for i in starts])
        rows = generator.start(prompts, np.full(len(prompts), 200), seed=0)
        outcome = generator.speculate(rows, 60, 4)[-1]
        found[f"int4 draft, {name}"] = share(outcome.accepted, outcome.rejected)
    copies = [text[i : i + 1000] for i in starts]
    edits = [copy.replace("thou", "you").replace("thy", "your") for copy in copies]
    found["lookup, copy"] = looked_up(copies, copies)
    found["lookup, edited copy"] = looked_up(copies, edits)
    found["lookup, new text"] = looked_up(copies, copies[1:] + copies[:1])
    print(found)
    keep("acceptance", found)


@app.command()
def tpu(
    size: Annotated[str, typer.Option()] = "2.7b",
    layers: Annotated[int | None, typer.Option(help="the first so many")] = None,
    tokens: Annotated[list[int], typer.Option(help="of a block; repeatable")] = (4, 8),
    file: Annotated[Path, typer.Option()] = FILE,
):
    """What the TPU's compiler makes of a round at batch 1, and of 12 steps a write at batch 64."""
    import keras_mamba2
    from benchmarks import programs
    from benchmarks import tpu_aot  # first: it sets what JAX reads when it is imported
    from benchmarks.workload import of_size

    def model(size, layers, speculation=None):
        workload = of_size(size, dtype="bfloat16", chunk_size=tpu_aot.CHUNK_SIZE)
        workload = replace(workload, num_layers=layers or workload.num_layers)
        lm = programs.abstract_model(workload)
        lm.compile(sampler="greedy", speculation=speculation)
        return lm

    def describe(traced) -> dict[str, Any]:
        _, module = tpu_aot.compile_and_read(traced)
        loops = [module.traffic(loop.called[0]) for loop in module.loops()]
        gb = [round(sum(n for n, _ in traffic) / 1e9, 3) for traffic in loops]
        return {
            "loops": len(loops),
            "hbm_gb": gb,
            "gflop": round(programs.product_flops(traced.jaxpr.jaxpr) / 1e9, 2),
            "kernels": [len(list(module.walk(loop.called[0]))) for loop in module.loops()],
            "host_transfers": module.host_transfers(),
        }

    draft = keras_mamba2.DraftModel(model("130m", layers))
    lm = model(size, layers)
    found = {"a step": describe(programs.decode_program(lm, 1, tpu_aot.on_tpu))}
    for name, proposer in (("lookup", keras_mamba2.PromptLookup()), ("130M draft", draft)):
        lm.compile(sampler="greedy", speculation=proposer)
        for t in tokens:
            traced = programs.speculative_program(lm, t - 1, tpu_aot.on_tpu)
            found[f"{name}, {t} tokens"] = describe(traced)
    for steps in (1, steps_a_write()):
        traced = programs.decode_program(lm, 64, tpu_aot.on_tpu, steps)
        found[f"64 rows, {steps} steps a write"] = describe(traced)
    print(json.dumps(found, indent=1))
    keep("tpu", found, file)


@app.command()
def report():
    """Writes the table of the README, and the plot of speed by acceptance."""
    found = json.loads(FILE.read_text())
    lines = ["| | 2 tokens | 4 | 8 | 16 |", "| --- |" + " --- |" * len(TOKENS)]
    for name in dict.fromkeys(key.split(",")[0] for key in found["blocks"]):
        cells = [f"{found['blocks'][f'{name}, {t} tokens']:.2f}" for t in TOKENS]
        lines.append(f"| a block of `{name}`, in steps | {' | '.join(cells)} |")
    for name in dict.fromkeys(key.split(",")[0] for key in found["blocks"]):
        costs = [found["blocks"][f"{name}, {t} tokens"] for t in TOKENS]
        cells = [f"{break_even(t, cost):.2f}" for t, cost in zip(TOKENS, costs, strict=True)]
        lines.append(f"| of `{name}`, pays above an acceptance of | {' | '.join(cells)} |")
    lines += ["", "| | |", "| --- | --- |"]
    lines += [f"| text that {name}, 130M, speed | {v:.2f}x |" for name, v in found["texts"].items()]
    lines += [
        f"| proposals accepted: {name} | {v:.0%} |" for name, v in found["acceptance"].items()
    ]
    write_table("\n".join(lines), HERE / "README.md", "speculation")
    plot(found["blocks"])


def break_even(t: int, cost: float) -> float:
    """The acceptance at which a round of t tokens makes as many as `cost` steps."""
    a = np.linspace(0, 1, 1001)
    return float(a[sum(a**i for i in range(t)) >= cost][0])


def plot(blocks: dict[str, float]) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    a = np.linspace(0, 1, 200)
    for t in TOKENS:
        cost = blocks[f"mamba2_130m_en, {t} tokens"]
        axes.plot(a, sum(a**i for i in range(t)) / cost, label=f"{t - 1} proposals")
    axes.axhline(1, color="gray", linestyle="--", linewidth=1)
    axes.set(xlabel="acceptance of a proposal", ylabel="tokens/s over plain decoding")
    axes.set_title("Speculation by lookup, 130M, float32, CPU")
    axes.legend()
    figure.tight_layout()
    figure.savefig(HERE / "results" / "speculation.svg")


def run_of(lm, t: int, steps: int):
    """A function that runs `steps` rounds of t tokens, or steps of plain decoding for `t = 1`."""
    generator = lm.make_generate_function()
    rows = generator.start([np.arange(100, 132)], np.array([10**6]))

    def run() -> float:
        nonlocal rows
        start = time.perf_counter()
        if t == 1:
            after, tokens, _ = generator.advance(rows, steps)
        else:
            after, tokens, *_ = generator.speculate(rows, steps, t - 1)
        np.asarray(tokens)  # waits
        rows = type(rows)(*after)
        return time.perf_counter() - start

    run()
    return run


def compiled_model(preset: str, sampler: str, speculation=None):
    """A model with random weights."""
    import keras

    import keras_mamba2

    keras.utils.set_random_seed(0)
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset, load_weights=False, preprocessor=None)
    lm.compile(sampler=sampler, speculation=speculation)
    return lm


def repeat_the_last_token(lm) -> None:
    """Without what the blocks add, the likeliest token is the one that was read."""
    for variable in lm.backbone.variables:
        if variable.path.endswith("out_proj/kernel"):
            variable.assign(np.zeros(variable.shape))


def unchanged(lm) -> None:
    """Leaves the weights as they are."""


def generate(lm, prompt, count: int) -> None:
    decoded(lm, [prompt], count)


def seconds_to_decode(lm, prompt, count: int) -> float:
    """Without the time of reading the prompt."""
    import jax

    generator = lm.make_generate_function()
    rows = generator.start([prompt], np.array([count]), seed=0)
    jax.block_until_ready(rows.state.layers)
    start = time.perf_counter()
    generator.decode(rows).all_tokens()
    return time.perf_counter() - start


def decoded(lm, prompts, count: int) -> np.ndarray:
    """The tokens `(b t)` after prompts."""
    generator = lm.make_generate_function()
    rows = generator.start(prompts, np.full(len(prompts), count), seed=0)
    return np.asarray(generator.decode(rows).all_tokens())


def looked_up(prompts: list[str], outputs: list[str]) -> float:
    """The acceptance of a lookup of 7, if the model writes exactly `outputs`."""
    import keras_mamba2
    from keras_mamba2.host.rows import Rows

    proposer, k = keras_mamba2.PromptLookup(7), 7
    accepted = rejected = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        text, end = np.frombuffer((prompt + output).encode(), np.uint8), len(prompt.encode())
        while end < len(text):
            context = proposer.start([text[:end]])
            found, _ = proposer.propose(Rows(*[None] * 6, context), k, None, 256)
            right = np.asarray(found)[0][: len(text) - end] == text[end : end + k]
            count = int(np.cumprod(right).sum())
            accepted, rejected = accepted + count, rejected + (count < len(right))
            end += count + 1
    return share(accepted, rejected)


def steps_a_write() -> int:
    from keras_mamba2.generation.decode import STEPS_A_WRITE

    return STEPS_A_WRITE


def share(accepted, rejected) -> float:
    return round(float(accepted) / max(float(accepted) + float(rejected), 1), 3)


def keep(name: str, found: dict[str, Any], file: Path = FILE) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(results | {name: found}, indent=1) + "\n")


if __name__ == "__main__":
    app()
