"""llama.cpp's own server, a process with the weights of one of our models."""

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx

OPTIONS = {"ignore_eos": True, "cache_prompt": False}  # of a request, that are not OpenAI's
START_SECONDS = 120
NEEDED = "Expected: the binary `llama-server` that llama.cpp builds."


def version(binary: Path) -> str:
    """What the binary says of itself.

    Raises:
        ValueError: if it is no server of llama.cpp, or no GGUF file can be written for it.
    """
    try:
        ran = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{binary} does not run: {error}. {NEEDED}") from error
    lines = (ran.stdout + ran.stderr).splitlines()
    told = [line for line in lines if line.startswith("version: ")]
    if ran.returncode or not told:
        raise ValueError(f"{binary} --version tells of no llama.cpp. {NEEDED}")
    if not find_spec("gguf"):
        raise ValueError("llama.cpp reads GGUF files. Write them with: pip install gguf.")
    return told[0].removeprefix("version: ")


@contextlib.contextmanager
def serving(binary: Path, lm, max_sequences: int, max_tokens: int) -> Iterator[str]:
    """The address of llama.cpp's server, for the same weights in float32.

    Args:
        binary: `llama-server`.
        lm: a `Mamba2CausalLM` that transformers and llama.cpp know.
        max_sequences: that are decoded at once.
        max_tokens: of each.
    """
    from benchmarks.gguf_file import write_gguf

    with tempfile.TemporaryDirectory() as temporary:
        folder, file, log = (Path(temporary, name) for name in ("model", "model.gguf", "log"))
        lm.export_to_transformers(folder)
        write_gguf(folder, file)
        port = free_port()
        command = [binary, "--model", file, "--parallel", max_sequences, "--cont-batching"]
        # A request ends when its part of the context is full, so there is a place more.
        command += ["--ctx-size", max_sequences * (max_tokens + 1), "--threads", os.cpu_count()]
        # No time is lost to states that are kept for requests to come: none begins like another.
        command += ["--cache-ram", 0, "--ctx-checkpoints", 0]
        command += ["--host", "127.0.0.1", "--port", port]
        with open(log, "w") as written:
            process = subprocess.Popen(list(map(str, command)), stdout=written, stderr=written)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_ready(process, f"{address}/health", log)
            yield address
        finally:
            process.terminate()
            process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_ready(process: subprocess.Popen, health: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(health).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"llama.cpp's server did not start:\n{log.read_text()[-2000:]}")
