"""Which backend `import keras_mamba2` takes, each case in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from keras_mamba2.backend_choice import KERAS_DEFAULTS

SCRIPT = "import keras_mamba2, keras_mamba2.ops, keras; print(keras.config.backend())"
WARNING = "set KERAS_BACKEND=jax before Keras is imported"


def backend_of(keras_home, script=SCRIPT, **environment):
    """The backend, and how often the log says that it is not JAX."""
    environment = {**os.environ, "KERAS_HOME": str(keras_home), **environment}
    if environment["KERAS_BACKEND"] is None:
        del environment["KERAS_BACKEND"]
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    return result.stdout.split()[-1], result.stderr.count(WARNING)


@pytest.mark.slow
def test_jax_where_nothing_was_chosen(tmp_path):
    assert backend_of(tmp_path, KERAS_BACKEND=None) == ("jax", 0)
    # Keras has written its defaults by now.
    assert json.loads((tmp_path / "keras.json").read_text()) == KERAS_DEFAULTS
    assert backend_of(tmp_path, KERAS_BACKEND=None) == ("jax", 0)


def test_the_variable_wins(tmp_path):
    assert backend_of(tmp_path, KERAS_BACKEND="tensorflow") == ("tensorflow", 1)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"backend": "torch"}, {"epsilon": 1e-6}])
def test_a_file_of_the_user_is_a_choice(tmp_path, change):
    (tmp_path / "keras.json").write_text(json.dumps(KERAS_DEFAULTS | change))
    expected = change.get("backend", "tensorflow")
    assert backend_of(tmp_path, KERAS_BACKEND=None) == (expected, 1)


@pytest.mark.slow
def test_keras_may_run_already(tmp_path):
    found = backend_of(tmp_path, f"import keras; {SCRIPT}", KERAS_BACKEND=None)
    assert found == ("tensorflow", 1)
