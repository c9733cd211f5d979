"""Several devices: virtual ones in one process, and two processes with one each."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_eight_devices_give_the_numbers_of_one():
    result = subprocess.run(
        [sys.executable, "-m", "tests.distribution.on_eight_devices"],
        cwd=ROOT,
        env=os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == [
        "check_ssd_sequence_parallel",
        "check_bad_meshes_are_refused",
        "check_training_and_generation",
        "check_collectives",
        "check_memory",
        "check_prefill_of_one_long_sequence",
    ]
