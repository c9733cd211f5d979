"""The command line against a hub, in a process of its own: what the environment says counts."""

import os
import subprocess
import sys

import pytest

from tests.conversion import checkpoints
from tests.hub_server import Hub
from tests.hub_server import serving


@pytest.fixture
def hub(tmp_path, byte_tokenizer):
    folder = checkpoints.save_transformers(
        checkpoints.random_model("plain", vocab_size=272), tmp_path / "model"
    )
    byte_tokenizer.engine.save(str(folder / "tokenizer.json"))
    return Hub({"user/model": {file.name: file.read_bytes() for file in folder.iterdir()}})


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "keras_mamba2.cli", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_endpoint_cache_and_offline_mode(hub, tmp_path):
    with serving(hub) as address:
        environment = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        result = run("convert", "hf://user/model", tmp_path / "new", **environment)
        assert result.returncode == 0, result.stderr
        assert "model.safetensors" in " ".join(hub.downloads())
        offline = run("inspect", "hf://user/model", **environment | {"HF_HUB_OFFLINE": "1"})
        assert offline.returncode == 0, offline.stderr
        assert "transformers" in offline.stdout
        missing = run("inspect", "hf://user/other", **environment)
        assert missing.returncode == 2
        assert (
            missing.stderr.strip()
            .splitlines()[-1]
            .startswith("error: There is no repository hf://user/other on the hub")
        )
