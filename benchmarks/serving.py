"""The server beside `lm.generate` and llama.cpp's, in one run: `python -m benchmarks.serving`.

Clients in another process stream answers over HTTP. Everything is measured by turns with what it is
compared with, so that what disturbs the machine disturbs both.
"""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated
from typing import Any

os.environ |= {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}

import keras
import numpy as np
import typer
import uvicorn

import keras_mamba2
from benchmarks import llama_server
from keras_mamba2.models.mamba2_tokenizer import byte_vocabulary
from keras_mamba2.serving.app import create_app
from keras_mamba2.serving.engine import Engine

PACKAGES = ("keras", "jax", "fastapi", "uvicorn")
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "seed": 1}
GREEDY = {"temperature": 0.0}
RANDOM = "random_130m"


def of_llama_cpp(binary: Path | None) -> Path | None:
    """Checks the binary before anything is measured."""
    try:
        if binary is not None:
            llama_server.version(binary)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return binary


def main(
    model: Annotated[list[str], typer.Option(help="repeatable")] = (
        "mamba2_tiny_shakespeare",
        RANDOM,
    ),
    clients: Annotated[list[int], typer.Option(help="at once; repeatable")] = (1, 8, 32, 64),
    prompt_tokens: Annotated[int, typer.Option(help="of each client")] = 64,
    new_tokens: Annotated[int, typer.Option(help="for each client")] = 128,
    long_prompt: Annotated[int, typer.Option(help="that is read beside a stream")] = 32_000,
    prefix_tokens: Annotated[int, typer.Option(help="that is known, or not")] = 4_000,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-server",
            help="the binary of llama.cpp's server, measured with the same weights",
            callback=of_llama_cpp,
        ),
    ] = None,
    file: Annotated[Path, typer.Option()] = Path(__file__).parent / "results" / "serving.json",
):
    """Measures throughput, time to the first token, and gaps; writes them and prints tables."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    found: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "versions": versions}
    if llama_cpp is None:
        print("without llama.cpp's server; --llama-server says where it is", flush=True)
    else:
        versions["llama-server"] = llama_server.version(llama_cpp)
    found["load_before"] = os.getloadavg()
    found["models"] = {}
    for name in model:
        lm = load(name)
        # Two at least: a stream, and the long prompt beside it.
        most, sizes = max(2, *clients), (prompt_tokens, new_tokens, rounds)
        longest = max(long_prompt, prefix_tokens) + 4 * new_tokens
        engine = Engine(lm, max_sequences=most, max_waiting=4 * most, max_tokens=longest)
        engine.start()
        with serving(engine, name) as address:
            figures: dict[str, Any] = {"throughput": {}}
            for count in clients:
                measured = throughput(lm, name, address, count, *sizes)
                figures["throughput"][count] = measured
                print(name, count, measured, flush=True)
            figures["gaps"] = gaps(name, address, long_prompt, new_tokens)
            print(name, figures["gaps"], flush=True)
            figures["prefix"] = prefix(name, address, prefix_tokens, rounds)
            print(name, figures["prefix"], flush=True)
            if llama_cpp is not None:
                figures["llama_cpp"] = {}
                length = prompt_tokens + new_tokens
                with llama_server.serving(llama_cpp, lm, most, length) as other:
                    for count in clients:
                        measured = beside(other, name, address, count, *sizes)
                        figures["llama_cpp"][count] = measured
                        print(name, count, measured, flush=True)
        engine.close()
        found["models"][name] = figures
    found["load_after"] = os.getloadavg()
    file.write_text(json.dumps(found, indent=1) + "\n")


def load(name: str):
    if name != RANDOM:
        return keras_mamba2.Mamba2CausalLM.from_preset(name)
    keras.utils.set_random_seed(0)
    backbone = keras_mamba2.Mamba2Backbone(
        vocabulary_size=50288, num_layers=24, hidden_dim=768, tie_word_embeddings=True
    )
    vocabulary = byte_vocabulary("<|endoftext|>")
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), 50277)}
    tokenizer = keras_mamba2.Mamba2Tokenizer(vocabulary, [])
    lm = keras_mamba2.Mamba2CausalLM(backbone, keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer))
    lm.compile()
    return lm


@contextlib.contextmanager
def serving(engine: Engine, name: str) -> Iterator[str]:
    """The address of a server in a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app = create_app(engine, name)
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def asked(address: str, clients: list[list[dict]]) -> list[list[dict]]:
    """What clients in another process have got."""
    command = [sys.executable, "-m", "benchmarks.serving_clients", address]
    given = json.dumps(clients)
    return json.loads(
        subprocess.run(command, input=given, stdout=subprocess.PIPE, check=True, text=True).stdout
    )


def prompt_of(count: int, seed: int | list[int]) -> list[int]:
    # Printable characters: a client sees a token when it has a text.
    return np.random.default_rng(seed).integers(32, 127, count).tolist()


def throughput(lm, name, address, count, prompt_tokens, new_tokens, rounds) -> dict[str, float]:
    """Tokens a second of both, and seconds to the first token."""
    ratios, rates, first = [], [], []
    for i in range(rounds + 1):  # the first warms up
        prompts = [prompt_of(prompt_tokens, [0, count, i, c]) for c in range(count)]
        alone = generated(lm, prompts, new_tokens)
        bodies = [
            [{"model": name, "prompt": prompt, "max_tokens": new_tokens, **SAMPLING}]
            for prompt in prompts
        ]
        served, seconds = rate(address, bodies)
        if i:
            rates.append((served, alone))
            ratios.append(served / alone)
            first += seconds
    return {
        "server_tokens_s": statistics.median(served for served, _ in rates),
        "generate_tokens_s": statistics.median(alone for _, alone in rates),
        "ratio": statistics.median(ratios),
        "first_token_s_p50": float(np.percentile(first, 50)),
        "first_token_s_p99": float(np.percentile(first, 99)),
    }


def rate(address: str, bodies: list[list[dict]]) -> tuple[float, list[float]]:
    """Tokens a second of all clients together, and each one's seconds to the first token."""
    answers = [answer for [answer] in asked(address, bodies)]
    begun = min(answer["begun"] for answer in answers)
    ended = max(answer["begun"] + answer["times"][-1] for answer in answers)
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return tokens / (ended - begun), [answer["times"][0] for answer in answers]


def beside(other, name, address, count, prompt_tokens, new_tokens, rounds) -> dict[str, Any]:
    """The same of our server and of llama.cpp's by turns, and how many times as fast ours is."""
    servers = {"server": (address, {}), "llama_cpp": (other, llama_server.OPTIONS)}
    rates: dict[str, list[float]] = {server: [] for server in servers}
    first: dict[str, list[float]] = {server: [] for server in servers}
    for i in range(rounds + 1):  # the first warms up
        prompts = [prompt_of(prompt_tokens, [1, count, i, c]) for c in range(count)]
        for server, (where, options) in servers.items():
            body = {"model": name, "max_tokens": new_tokens, **GREEDY, **options}
            served, seconds = rate(where, [[{**body, "prompt": prompt}] for prompt in prompts])
            if i:
                rates[server].append(served)
                first[server] += seconds
    found: dict[str, Any] = {
        server: {
            "tokens_s": statistics.median(rates[server]),
            "first_token_s_p50": float(np.percentile(first[server], 50)),
            "first_token_s_p99": float(np.percentile(first[server], 99)),
        }
        for server in servers
    }
    ratios = np.divide(rates["server"], rates["llama_cpp"])
    return found | {"ratio": float(np.median(ratios))}


def generated(lm, prompts, new_tokens) -> float:
    """Tokens a second of `lm.generate`, all prompts in one batch."""
    ids = np.array(prompts)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    begun = time.perf_counter()
    _, rows = lm.generate(inputs, max_new_tokens=new_tokens, return_logprobs=True, **SAMPLING)
    seconds = time.perf_counter() - begun
    return sum(len(row["token_ids"]) for row in rows) / seconds


def gaps(name, address, long_prompt, new_tokens) -> dict[str, float]:
    """The longest gap in eight streams after each other, without and with a long prompt beside."""
    short = {"model": name, "prompt": prompt_of(16, 0), **SAMPLING}
    long = {"model": name, "prompt": prompt_of(long_prompt, 1), "max_tokens": 1, **SAMPLING}
    streaming = [{**short, "max_tokens": 4 * new_tokens}] * 8
    [alone] = asked(address, [streaming])
    [streams, [read]] = asked(address, [streaming, [{**long, "after": 0.3}]])
    # Only of what came while it was read.
    start, end = read["begun"], read["begun"] + read["times"][0]
    times = [[s["begun"] + t for t in s["times"] if start < s["begun"] + t < end] for s in streams]
    beside = max((float(np.diff(t).max()) for t in times if len(t) > 1), default=0.0)
    without = max(float(np.diff(s["times"]).max()) for s in alone)
    return {
        "longest_gap_s": without,
        "longest_gap_s_while_reading": beside,
        "ratio": beside / without,
        "long_prompt_tokens": long_prompt,
        "seconds_to_read_it": read["times"][0],
    }


def prefix(name, address, prefix_tokens, rounds) -> dict[str, float]:
    """Seconds to the first token after a long beginning that is known, and one that is not."""
    known, unknown = [], []
    for i in range(rounds):
        begin = prompt_of(prefix_tokens, 5000 + i)
        options = {"model": name, "max_tokens": 4, **SAMPLING}
        bodies = [{**options, "prompt": [*begin, *prompt_of(20, 9 + j)]} for j in range(3)]
        [[first, second, third]] = asked(address, [bodies])
        unknown.append(first["times"][0])
        known.append(third["times"][0])
        cached = third["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= prefix_tokens, (cached, second["usage"])
    return {
        "first_token_s": statistics.median(unknown),
        "first_token_s_if_known": statistics.median(known),
        "times_as_fast": statistics.median(unknown) / statistics.median(known),
    }


if __name__ == "__main__":
    typer.run(main)
