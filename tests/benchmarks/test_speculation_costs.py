"""What the TPU compiler makes of proposals, and how a lookup's acceptance is counted."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from benchmarks import speculation
from benchmarks.rounds import HERE


def test_a_lookup_is_right_in_a_copy_and_wrong_in_new_text():
    text = "the quick brown fox jumps over a lazy dog"
    assert speculation.looked_up([text + "."], [text]) > 0.8
    assert speculation.looked_up(["abcdefgh"], ["ijklmnop"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu is not installed")
def test_programs_for_a_tpu(tmp_path, without_flags):
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.speculation", "tpu", "--layers=2", "--tokens=4"]
    command += [f"--file={file}"]
    subprocess.run(command, cwd=HERE.parent, env=without_flags, check=True)
    found = json.loads(file.read_text())["tpu"]
    assert not any(program["host_transfers"] for program in found.values())

    [step] = found["a step"]["hbm_gb"]
    [block] = found["lookup, 4 tokens"]["hbm_gb"]  # one loop
    assert block < 1.05 * step
    draft, both = found["130M draft, 4 tokens"]["hbm_gb"]  # counted once in the loop around it
    assert both < 1.05 * (step + draft)

    steps = speculation.steps_a_write()
    [written] = found["64 rows, 1 steps a write"]["hbm_gb"]
    inner, cycle = found[f"64 rows, {steps} steps a write"]["hbm_gb"]
    assert inner + (cycle - inner) / steps < 0.8 * written
