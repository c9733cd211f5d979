"""What the TPU compiler makes of a hybrid's decode loop."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from benchmarks.rounds import HERE


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu is not installed")
def test_a_step_reads_the_chosen_experts_and_little_more(tmp_path, without_flags):
    file = tmp_path / "results" / "found.json"
    command = [sys.executable, "-m", "benchmarks.hybrids_tpu", "--preset=granite_4.0_h_tiny"]
    command += ["--blocks=12", f"--file={file}"]
    subprocess.run(command, cwd=HERE.parent, env=without_flags, check=True)
    [found] = json.loads(file.read_text()).values()
    assert (found["loops"], found["host_transfers"]) == (1, [])
    assert found["hbm_gb"] < 1.05 * found["least_gb"]
