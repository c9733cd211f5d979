"""What the TPU compiler makes of stacked blocks: 2.7B, all 64 layers."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from benchmarks.rounds import HERE
from benchmarks.workload import of_size


@pytest.fixture(scope="module")
def programs(tmp_path_factory, without_flags):
    file = tmp_path_factory.mktemp("tpu") / "results" / "found.json"
    command = [sys.executable, "-m", "benchmarks.stacked_tpu", "--only-stacked"]
    command += ["--batch-size=1", "--batch-size=8", "--block=32", f"--file={file}"]
    subprocess.run(command, cwd=HERE.parent, env=without_flags, check=True)
    assert "| decode, batch 1 |" in (file.parents[1] / "README.md").read_text()
    return {row["program"]: row for row in json.loads(file.read_text())["programs"]}


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu is not installed")
class TestStacked:
    @pytest.mark.parametrize("batch_size", [1, 8])
    def test_a_step_moves_weights_and_states_and_no_copy_of_them(self, programs, batch_size):
        found = programs[f"decode, batch {batch_size}"]
        least = of_size("2.7b", dtype="bfloat16").decode_bytes(batch_size) / 1e9
        assert 0.95 * least < found["hbm_gb"] < 1.02 * least
        # The loop over the tokens, and that over the blocks.
        assert (found["loops"], found["host_transfers"]) == (2, [])

    def test_a_prefill_copies_no_weight(self, programs):
        found = programs["prefill, 32"]
        workload = of_size("2.7b", dtype="bfloat16")
        weights, state = workload.weight_bytes() / 1e9, workload.state_bytes(1) / 1e9
        # The state is stacked and laid out for the loop, and back: a thirtieth of the weights.
        assert found["hbm_gb"] < weights + 10 * state
        assert found["temporaries_gb"] < 3 * state
