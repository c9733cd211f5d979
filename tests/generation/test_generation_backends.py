"""Generation on the backends that this process does not run: the text of JAX."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.generation.on_backend import results

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected(preset_folder):
    return results(preset_folder)


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_generation_is_that_of_jax(backend, preset_folder, expected):
    result = subprocess.run(
        [sys.executable, "-m", "tests.generation.on_backend", str(preset_folder)],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    for name, value in expected.items():
        about = name in ("perplexity", "int8 loss")
        assert found.pop(name) == (pytest.approx(value, rel=1e-4) if about else value), name
    assert not found
