"""States in bfloat16: what they cost in exactness, and save in bytes.

`python -m benchmarks.state_dtype` and one of

- `error`: of the outputs of 100,000 tokens, against a state in float64;
- `perplexity`: of the embedded preset, over the last tenth of tiny Shakespeare, one token at a
  time, so that the state is rounded after each;
- `tpu`: the bytes of HBM of a step at 2.7B and batch 64, from the program compiled for a v6e;
- `report`: the README's table.

"To the nearest" is what the package does not do: the same dtype without drawn numbers. Nor int8,
with a scale for each channel of a head, drawn.
"""

import json
import math
import os
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
from benchmarks.speculation import SHARED_TEXT
from benchmarks.speculation import keep

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
FILE = HERE / "results" / "state_dtype.json"
HEADS, CHANNELS, SIZE = 8, 8, 16
# Step sizes as a new model has them, and ten times slower, where more is added up.
STEP_SIZES = {"new model": (1e-3, 1e-1), "ten times slower": (1e-4, 1e-2)}
WAYS = ("float32", "bfloat16", "bfloat16, to the nearest", "int8")


@app.command()
def error(tokens: Annotated[int, typer.Option()] = 100_000):
    """RMS error of outputs over the second half, as a share of their RMS."""
    found = {}
    for name, limits in STEP_SIZES.items():
        inputs, A = random_inputs(tokens, *limits)
        truth = float64_outputs(inputs, A)[tokens // 2 :]
        for way in WAYS:
            wrong = outputs(inputs, A, way)[tokens // 2 :] - truth
            found[f"{way}, {name}"] = float(np.sqrt(np.mean(wrong**2) / np.mean(truth**2)))
        print(found, flush=True)
    keep("error", found, FILE)


def random_inputs(t: int, low: float, high: float):
    """x `(t h p)`, dt `(t h)`, B and C `(t n)`, and A `(h)`."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.uniform(math.log(low), math.log(high), HEADS))
    dt = scale * np.exp(0.5 * rng.normal(size=(t, HEADS)))
    x = rng.normal(size=(t, HEADS, CHANNELS)) + 0.3
    B, C = rng.normal(size=(2, t, SIZE)) + 0.3
    return tuple(a.astype("float32") for a in (x, dt, B, C)), -rng.uniform(1, 16, HEADS)


def float64_outputs(inputs, A) -> np.ndarray:
    x, dt, B, C = (a.astype("float64") for a in inputs)
    state, y = np.zeros((HEADS, CHANNELS, SIZE)), np.empty(x.shape)
    for i in range(len(x)):
        state = state * np.exp(dt[i] * A.astype("float32"))[:, None, None]
        state += (x[i] * dt[i][:, None])[..., None] * B[i]
        y[i] = state @ C[i]
    return y


def outputs(inputs, A, way: str) -> np.ndarray:
    from jax import lax
    from jax import numpy as jnp

    from keras_mamba2.ops import ssd_step
    from keras_mamba2.ops.stochastic_rounding import stochastic_round

    kept = {
        "float32": lambda state, i: state,
        "bfloat16": lambda state, i: stochastic_round(state, i[None]),
        "bfloat16, to the nearest": lambda state, i: state.astype("bfloat16"),
        "int8": lambda state, i: to_int8(state, i[None]),
    }[way]

    def token(state, now):
        x, dt, B, C, i = now
        y, state = ssd_step(
            x[None], dt[None], jnp.asarray(A, "float32"), B[None, None], C[None, None], state=state
        )
        return kept(state, i), y[0]

    start = kept(jnp.zeros((1, HEADS, CHANNELS, SIZE)), np.int32(0))
    count = np.arange(len(inputs[0]), dtype="int32")
    return np.asarray(lax.scan(token, start, (*inputs, count))[1], "float64")


def to_int8(state, index):
    """What int8 would hold of a state `(b h p n)`, as float32: up or down as drawn."""
    import jax

    key = jax.random.fold_in(jax.random.key(0), index[0])
    scale = abs(state).max(axis=-1, keepdims=True) / 127
    numbers = jax.numpy.floor(
        state / jax.numpy.maximum(scale, 1e-30) + jax.random.uniform(key, state.shape)
    )
    return numbers * scale


@app.command()
def perplexity(
    file: Annotated[Path, typer.Argument(help="tiny Shakespeare")] = SHARED_TEXT,
    rows: Annotated[int, typer.Option(help="into which the text is cut")] = 16,
):
    """The mean loss of a character, in nats."""
    import keras_mamba2
    from keras_mamba2.layers import mamba2_mixer

    text = np.frombuffer(file.read_bytes(), np.uint8)
    text = text[-(len(text) // 10) :]
    text = text[: len(text) // rows * rows].reshape(rows, -1).astype("int32")
    found, drawn = {}, mamba2_mixer.stochastic_round
    for way in WAYS:
        lm = keras_mamba2.Mamba2CausalLM.from_preset(
            "mamba2_tiny_shakespeare", state_dtype=None if way == "float32" else "bfloat16"
        )
        mamba2_mixer.stochastic_round = {
            "bfloat16, to the nearest": to_the_nearest,
            # The state is kept in bfloat16 all the same, whose own error is much smaller.
            "int8": lambda x, index: to_int8(x, index).astype("bfloat16"),
        }.get(way, drawn)
        found[way] = loss(lm, text)
        print(found, flush=True)
    keep("perplexity", found, FILE)


def to_the_nearest(x, index):
    return x.astype("bfloat16")


def loss(lm, token_ids: np.ndarray) -> float:
    """Mean over all tokens `(b t)` but the first, read one at a time."""
    import jax

    def token(carry, ids):
        state, total = carry
        now, after = ids
        hidden_states, state = lm.backbone.step(now, state)
        logprobs = jax.nn.log_softmax(lm.logits(hidden_states))
        new = -jax.numpy.take_along_axis(logprobs, after[:, None], axis=-1).sum()
        return (state, total + new / token_ids[:, 1:].size), None

    start = lm.backbone.initial_state(len(token_ids)), 0.0
    pairs = token_ids[:, :-1].T, token_ids[:, 1:].T
    return float(jax.jit(lambda: jax.lax.scan(token, start, pairs)[0][1])())


@app.command()
def tpu(
    size: Annotated[str, typer.Option()] = "2.7b",
    batch_size: Annotated[int, typer.Option()] = 64,
    layers: Annotated[int | None, typer.Option(help="the first so many")] = None,
    file: Annotated[Path, typer.Option()] = FILE,
):
    """GB of HBM of a step, with the state written in each step, and every 12."""
    from benchmarks import programs
    from benchmarks import tpu_aot  # first: it sets what JAX reads when it is imported
    from benchmarks.speculation import steps_a_write
    from benchmarks.workload import of_size

    found: dict[str, Any] = {}
    for dtype in (None, "bfloat16"):
        workload = of_size(size, dtype="bfloat16", chunk_size=tpu_aot.CHUNK_SIZE)
        workload = replace(workload, num_layers=layers or workload.num_layers)
        lm = programs.abstract_model(workload, state_dtype=dtype)
        for steps in (1, steps_a_write()):
            traced = programs.decode_program(lm, batch_size, tpu_aot.on_tpu, steps)
            _, module = tpu_aot.compile_and_read(traced)
            gb = [sum(n for n, _ in module.traffic(loop.called[0])) for loop in module.loops()]
            mean = gb[0] if steps == 1 else gb[0] + (gb[1] - gb[0]) / steps
            found[f"{dtype or 'float32'}, {steps} steps a write"] = round(mean / 1e9, 3)
            print(found, module.host_transfers(), flush=True)
    keep("tpu", found, file)


@app.command()
def report():
    """Writes the README's table."""
    found = json.loads(FILE.read_text())
    lines = ["| state | " + " | ".join(WAYS) + " |", "| --- |" + " --- |" * len(WAYS)]
    for name in STEP_SIZES:
        cells = [f"{found['error'][f'{way}, {name}']:.1e}" for way in WAYS]
        lines.append(f"| error after 100,000 tokens, {name} | {' | '.join(cells)} |")
    losses = found["perplexity"]
    cells = [f"{losses[way]:.5f}" if way in losses else "" for way in WAYS]
    lines.append(f"| loss of the embedded preset, nats a character | {' | '.join(cells)} |")
    for steps in dict.fromkeys(key.split(", ")[1] for key in found["tpu"]):
        cells = [f"{found['tpu'][f'{dtype}, {steps}']:.1f}" for dtype in ("float32", "bfloat16")]
        often = "in every step" if steps.startswith("1 ") else f"once for {steps.split()[0]} steps"
        lines.append(
            f"| GB of HBM a step, 2.7B, batch 64, written {often} | {' | '.join(cells)} | | |"
        )
    write_table("\n".join(lines), HERE / "README.md", "state")


if __name__ == "__main__":
    app()
