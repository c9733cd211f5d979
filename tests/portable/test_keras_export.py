"""Formats of Keras' own `export`, which has the forward pass and no state."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "formats"),
    [("jax", ["tf_saved_model"]), ("tensorflow", ["tf_saved_model", "onnx"])],
)
def test_other_runtimes_give_what_the_model_gives(backend, formats, tmp_path):
    command = [sys.executable, str(HERE / "keras_export.py"), str(tmp_path), *formats]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert list(found) == formats
    for difference, largest in found.values():
        assert difference < 1e-5 * largest
