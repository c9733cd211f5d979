import subprocess
import sys

import keras_mamba2

HEAVY = ("tensorflow", "torch", "transformers", "matplotlib", "typer", "pandas", "scipy")


def test_import_brings_nothing_heavy_beside_keras_hub():
    """`import keras_mamba2` costs little beside `import keras_hub`: counted in modules."""
    script = f"""
import sys
import keras_hub
before = set(sys.modules)
import keras_mamba2
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(len(set(sys.modules) - before), sorted(new & set({HEAVY})))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    count, heavy = result.stdout.strip().splitlines()[-1].split(" ", 1)
    assert heavy == "[]"
    assert int(count) < 90  # 64, all of them our own


def test_version_is_known():
    assert keras_mamba2.__version__.count(".") == 2
