import os
import pathlib
import re
import subprocess
import sys

import keras_mamba2

ROOT = pathlib.Path(__file__).parent.parent

# What the package calls when it is imported.
AT_IMPORT = ("choose_backend", "report_other_backend", "leave_out_unused", "leaves_out_keras")
AT_IMPORT += ("pause_garbage_collection", "resume_garbage_collection")
HEAVY = ("tensorflow", "torch", "transformers", "matplotlib", "typer", "pandas", "scipy")
HEAVY += ("fastapi", "prometheus_client", "pydantic", "uvicorn")


def test_import_brings_nothing_heavy_beside_keras_hub():
    """Beside `import keras_hub`, `import keras_mamba2` imports next to no modules of others."""
    script = f"""
import sys
import keras_hub
before = set(sys.modules)
import keras_mamba2
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
foreign = [name for name in set(sys.modules) - before if name.split(".")[0] != "keras_mamba2"]
print(len(foreign), sorted(new & set({HEAVY})))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    count, heavy = result.stdout.strip().splitlines()[-1].split(" ", 1)
    assert heavy == "[]"
    assert int(count) < 10


def test_version_is_known():
    assert keras_mamba2.__version__.count(".") == 2


def test_the_readme_example_runs_as_it_stands(tmp_path):
    """Unmodified, as a newcomer's program: no variable chooses the backend."""
    readme = (ROOT / "README.md").read_text()
    example = re.search(r"## In Python\n+```python\n(.*?)```", readme, re.DOTALL).group(1)
    environment = {name: v for name, v in os.environ.items() if name != "KERAS_BACKEND"}
    environment["KERAS_HOME"] = str(tmp_path / "home")
    result = subprocess.run(
        [sys.executable, "-c", example + "\nimport keras; print(keras.backend.backend())"],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True},
    )
    assert result.returncode == 0, result.stderr
    assert "ROMEO:" in result.stdout
    assert result.stdout.endswith("jax\n")
    assert (tmp_path / "for_transformers" / "model.safetensors").is_file()


def test_everything_public_has_a_place_in_the_reference():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    places = {line.split(".")[-1] for line in pages.splitlines() if line.startswith(":::")}
    modules = (keras_mamba2, keras_mamba2.layers, keras_mamba2.ops, keras_mamba2.training)
    public = {
        name
        for module in modules
        for name, value in vars(module).items()
        if not name.startswith("_")
        and str(getattr(value, "__module__", "")).startswith("keras_mamba2")
        and name not in AT_IMPORT
    }
    assert len(public) > 25
    assert public - places == set()
