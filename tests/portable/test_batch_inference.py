"""`guides/batch_inference.py` with local Ray, and workers that are killed."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import keras_mamba2

pytest.importorskip("ray")
HERE = pathlib.Path(__file__).parent
PROMPTS = {f"prompt {i}": f"To be {i}" for i in range(20)}


def run(folder, when):
    """The texts, if a worker is killed before or after it has written its first file, or never."""
    command = [sys.executable, str(HERE / "kill_workers.py"), str(folder), when]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert (folder / f"killed {when}").exists() == (when != "never")
    return json.loads((folder / "texts.json").read_text())


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_twice(preset_folder, tmp_path):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(str(preset_folder))
    texts = lm.generate(list(PROMPTS.values()), max_new_tokens=12, seed=1)
    expected = dict(zip(PROMPTS, texts, strict=True))
    lm.export_programs(tmp_path / "programs", platforms=["cpu"], batch_sizes=[4])
    (tmp_path / "prompts").mkdir()
    lines = [json.dumps({"id": id, "prompt": prompt}) for id, prompt in PROMPTS.items()]
    for i in range(2):
        (tmp_path / "prompts" / f"{i}.jsonl").write_text("\n".join(lines[i * 10 : i * 10 + 10]))
    results = tmp_path / "results"
    assert run(tmp_path, "before") == expected
    shutil.rmtree(results)
    assert run(tmp_path, "after") == expected
    # As after a run that was stopped: what is there stays, what is missing comes.
    files = sorted(results.glob("*.jsonl"))
    files[0].unlink()
    times = [file.stat().st_mtime_ns for file in files[1:]]
    assert run(tmp_path, "never") == expected
    assert [file.stat().st_mtime_ns for file in files[1:]] == times
