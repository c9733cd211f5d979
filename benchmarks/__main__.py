"""Measures `keras_mamba2` and its peers side by side: `python -m benchmarks`.

Each subject runs in a process of its own, one at a time, round after round (A B C, A B C, ...):
what disturbs the machine for a while disturbs a round, and ratios are taken within rounds.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated
from typing import Any

import typer
from tqdm import tqdm

from benchmarks.adapters import ADAPTERS
from benchmarks.subject import MACHINE
from benchmarks.workload import FULL
from benchmarks.workload import QUICK

HERE = Path(__file__).parent
PACKAGES = ("keras", "keras-hub", "jax", "jaxlib", "torch", "transformers", "mamba2-jax")
# One device for all, and no chatter.
ENVIRONMENT = {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TYPER_STANDARD_TRACEBACK": "1",
}
TIMEOUT = 3600  # seconds for one subject in one round


def main(
    name: Annotated[str, typer.Option(help="NAME.json and NAME.png in results/")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    batch_size: Annotated[list[int], typer.Option(help="for decoding; repeatable")] = (1,),
    quick: Annotated[bool, typer.Option(help="tiny shapes, to try the command")] = False,
    folder: Annotated[Path, typer.Option(help="of README.md and results/")] = HERE,
):
    """Measures all subjects, writes the results, and from them the table and the plot."""
    options = [f"--batch-size={b}" for b in batch_size] + ["--quick"] * quick
    results = describe_run() | {"workload": asdict(QUICK if quick else FULL)}
    results |= {"batch_sizes": list(batch_size), "rounds": [{} for _ in range(rounds)]}
    path = folder.resolve() / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = [(found, subject) for found in results["rounds"] for subject in (MACHINE, *ADAPTERS)]
    for found, subject in (progress := tqdm(plan, unit="subject")):
        progress.set_postfix_str(subject)
        found[subject] = run_subject([subject, *options])
        path.write_text(json.dumps(results, indent=2) + "\n")
    subprocess.run([*module("report"), str(path)], cwd=HERE.parent, check=True)
    failed = {name for found in results["rounds"] for name in found if "failed" in found[name]}
    if failed:
        raise SystemExit(f"Failed, for reasons written to {path}: {', '.join(sorted(failed))}")


def run_subject(arguments: list[str]) -> dict[str, Any]:
    """What the subject prints, or `{"failed": reason}`: one failure does not end the run."""
    try:
        done = subprocess.run(
            [*module("subject"), *arguments],
            cwd=HERE.parent,
            env=os.environ | ENVIRONMENT,
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
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "commit": None if status else commit,
        "machine": {
            "cpu": cpu_model(),
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


if __name__ == "__main__":
    typer.run(main)
