"""`guides/batch_inference.py` with local Ray, and workers that are killed."""

import json
import os
import pathlib
import runpy
import subprocess
import sys
from importlib.util import find_spec

import pytest

import keras_mamba2

HERE = pathlib.Path(__file__).parent
PROMPTS = {
    **{i: f"To be {i}" for i in range(15)},
    **{"007": "007", "07": "1984", "1e5": "true", "100000": "\u2028", "9" * 20: "9" * 20},
}


@pytest.mark.skipif(not find_spec("ray"), reason="ray is not installed")
def test_a_folder_without_prompts_is_named(tmp_path):
    (tmp_path / "prompts.json").write_text('{"id": 1, "prompt": "To be"}')
    run = runpy.run_path(str(HERE.parents[1] / "guides" / "batch_inference.py"))["run"]
    with pytest.raises(ValueError, match=r"There are no prompts in files .*/\*\.jsonl"):
        run(tmp_path, tmp_path, tmp_path / "results")


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="ray is not installed")
def test_nothing_is_lost_and_nothing_twice(preset_folder, tmp_path):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(str(preset_folder))
    texts = lm.generate(list(PROMPTS.values()), max_new_tokens=12, seed=1)
    expected = dict(zip(map(str, PROMPTS), texts, strict=True))
    lm.export_programs(tmp_path / "programs", platforms=["cpu"], batch_sizes=[4])
    (tmp_path / "prompts").mkdir()
    lines = [
        json.dumps({"id": id, "prompt": prompt}, ensure_ascii=False)
        for id, prompt in PROMPTS.items()
    ]
    for i in range(2):
        (tmp_path / "prompts" / f"{i}.jsonl").write_text(
            "\n".join(lines[i * 10 : i * 10 + 10]), "utf-8"
        )
    command = [sys.executable, str(HERE / "kill_workers.py"), str(tmp_path)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "killed before").exists()
    assert (tmp_path / "killed after").exists()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"killed": expected, "again": expected, "untouched": True}
