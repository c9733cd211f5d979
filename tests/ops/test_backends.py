"""The operations on the backends that this process does not run."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_operations_are_the_reference(backend):
    result = subprocess.run(
        [sys.executable, "-m", "tests.backend_check"],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    passed = result.stdout.split()
    assert {"check_ssd", "check_ssd_gradients", "check_mixer"} <= set(passed)
    assert ("check_tensorflow_graphs" in passed) == (backend == "tensorflow")
