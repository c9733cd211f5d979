"""What eight TPU chips hold and exchange, read from the training step compiled for them."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest

from benchmarks.rounds import HERE
from benchmarks.workload import of_size


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu is not installed")
def test_each_chip_holds_an_eighth_and_gathers_what_it_lacks(tmp_path, without_flags):
    file = tmp_path / "results" / "found.json"
    command = [sys.executable, "-m", "benchmarks.tpu_slice", "--size=130m", "--layers=1"]
    command += ["--mesh=batch", "--blocks=stored", f"--file={file}"]
    subprocess.run(command, cwd=HERE.parent, env=without_flags, check=True)
    [found] = json.loads(file.read_text())["programs"]
    # Weights and the two moments of Adam, all float32.
    whole = 3 * replace(of_size("130m"), num_layers=1).weight_bytes() / 1e9
    assert found["arguments_gb"] == pytest.approx(whole / 8, rel=0.05)
    assert found["collectives"]["all-gather"] >= 3  # the embedding and two projections
    assert "| batch | stored |" in (tmp_path / "README.md").read_text()
