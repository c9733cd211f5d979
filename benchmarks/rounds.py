"""Runs subjects by turns, each in a process of its own, and writes what they report.

One at a time, round after round (A B C, A B C, ...): what disturbs the machine for a while
disturbs a round, and ratios are taken within rounds.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.report import HERE
from benchmarks.workload import Workload

PACKAGES = ("keras", "keras-hub", "jax", "jaxlib", "torch", "transformers", "mamba2-jax")
PACKAGES += (
    "llama_cpp_python",
    "gguf",
    "mamba-ssm",
    "causal-conv1d",
    "triton",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)
JAX_PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}
# One device for all, and no chatter.
ENVIRONMENT = {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TYPER_STANDARD_TRACEBACK": "1",
}
TIMEOUT = 3600  # seconds for one subject in one round


def measure_rounds(
    path: Path,
    workload: Workload,
    subjects: dict[str, str],
    batch_sizes: Sequence[int],
    rounds: int,
    environments: dict[str, dict[str, str]] | None = None,
    weights: Path | None = None,
) -> list[str]:
    """Measures subjects by turns, writes what they report to `path`, and returns who failed.

    The longest prompts, which take minutes, are measured in the first round only.

    Args:
        path: of a JSON file.
        workload: what is measured.
        subjects: the subjects of `subject.py`, by the names that they have in the results.
        batch_sizes: for decoding.
        rounds: int.
        environments: of some of the subjects, variables that differ.
        weights: a folder of `checkpoint.py`; by default each subject has random weights of its own.
    """
    options = [f"--batch-size={b}" for b in batch_sizes]
    options += [] if weights is None else [f"--weights={weights}"]
    changes = [json.dumps(asdict(workload)), json.dumps(asdict(workload.without_longest()))]
    results = describe_run() | {"workload": asdict(workload), "batch_sizes": list(batch_sizes)}
    results["rounds"] = [{} for _ in range(rounds)]
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = [(i, name) for i in range(rounds) for name in subjects]
    for i, name in (progress := tqdm(plan, unit="subject")):
        progress.set_postfix_str(name)
        platform = {"JAX_PLATFORMS": JAX_PLATFORMS[workload.platform]}
        environment = ENVIRONMENT | platform | (environments or {}).get(name, {})
        arguments = [subjects[name], *options, "--changes", changes[i > 0]]
        results["rounds"][i][name] = run_subject(arguments, environment)
        path.write_text(json.dumps(results, indent=2) + "\n")
    return sorted({n for found in results["rounds"] for n in found if "failed" in found[n]})


def run_subject(arguments: list[str], environment: dict[str, str] = ENVIRONMENT) -> dict[str, Any]:
    """What the subject prints, or `{"failed": reason}`: one failure does not end the run."""
    try:
        done = subprocess.run(
            [*module("subject"), *arguments],
            cwd=HERE.parent,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {TIMEOUT} s"}
    if done.returncode:
        return {"failed": f"exit status {done.returncode}: {done.stderr.strip()[-1000:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def module(name: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}"]


def describe_run() -> dict[str, Any]:
    describe = f"git -C {shlex.quote(str(HERE))} describe --always --dirty"
    status, commit = subprocess.getstatusoutput(describe)
    versions = {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": None if status else commit,
        "machine": {
            "cpu": cpu_model(),
            "gpu": gpu_model(),
            "cores": os.cpu_count(),
            "load_before": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), **dict(sorted(versions.items()))},
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def gpu_model() -> str | None:
    """The name and the driver of the first NVIDIA GPU."""
    query = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"
    status, found = subprocess.getstatusoutput(query)
    return None if status else found.splitlines()[0]
