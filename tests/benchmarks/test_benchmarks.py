"""The whole benchmark at tiny shapes, and the arithmetic behind its table."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import quantization
from benchmarks.__main__ import SUBJECTS
from benchmarks.adapters import ADAPTERS
from benchmarks.report import MACHINE
from benchmarks.report import summarize
from benchmarks.report import table
from benchmarks.rounds import HERE
from benchmarks.rounds import run_subject
from benchmarks.workload import FULL
from benchmarks.workload import QUICK
from keras_mamba2 import Mamba2Backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    shutil.copy(HERE / "README.md", folder)
    command = ["-m", "benchmarks", "--quick", "--rounds=1", "--name=try", f"--folder={folder}"]
    subprocess.run([sys.executable, *command], cwd=HERE.parent, check=True)
    return folder


@pytest.fixture
def results(folder) -> dict:
    return json.loads((folder / "results" / "try.json").read_text())


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_is_measured_or_absent(results, subject):
    found = results["rounds"][0][subject]
    packages = ADAPTERS[subject].packages if subject in ADAPTERS else ()
    if all(find_spec(package) for package in packages):
        assert all(figure > 0 for figure in found.values())
    else:
        assert set(found) == {"absent"}


def test_run_is_described(results):
    assert results["machine"]["cores"] >= 1
    assert results["versions"]["keras"]
    assert "--quick" in results["command"]


def test_table_stands_in_the_readme_and_the_prose_stays(folder, results):
    before, after = (HERE / "README.md").read_text(), (folder / "README.md").read_text()
    assert table(results) in after
    assert after.partition("<!-- table")[0] == before.partition("<!-- table")[0]
    assert after.rpartition("table: end -->")[2] == before.rpartition("table: end -->")[2]


def test_plot_is_small(folder):
    assert 0 < (folder / "results" / "try.png").stat().st_size < 100_000


def test_missing_package_is_reported_as_absent(results, tmp_path):
    (tmp_path / "mamba2_jax.py").write_text("raise ModuleNotFoundError('no mamba2_jax')")
    command = [sys.executable, "-m", "benchmarks.subject", "mamba2-jax", "--batch-size=1"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    printed = subprocess.check_output(command, cwd=HERE.parent, env=env)
    found = json.loads(printed)
    assert found == {"absent": "no mamba2_jax"}

    results["rounds"][0]["mamba2-jax"] = found
    results["summary"] = summarize(results)
    assert table(results).splitlines()[2].endswith("| absent |")


def test_failure_is_recorded_and_does_not_end_the_run(results):
    failure = run_subject(["no-such-subject", "--batch-size=1"])
    assert failure["failed"].endswith("KeyError: 'no-such-subject'")
    results["rounds"][0]["transformers"] = failure
    results["summary"] = summarize(results)
    assert table(results).splitlines()[2].split(" | ")[2] == "failed"


def test_noise_of_a_round_cancels_in_ratios(results):
    """The second round is three times slower for everybody, the third for one peer alone."""

    def found(slower, peer_slower):
        return {
            MACHINE: {"read_gb_per_s": 10 / slower, "matmul_gflop_per_s": 100 / slower},
            "keras_mamba2": {"decode_ms_1": 10 * slower, "decode_gb_per_s_1": 8 / slower},
            "transformers": {"decode_ms_1": 40 * slower * peer_slower},
        }

    results["rounds"] = [found(1, 1), found(3, 1), found(1, 3)]
    summary = summarize(results)
    assert summary["transformers"]["decode_ms_1"]["times_better"] == pytest.approx(4)
    assert summary["keras_mamba2"]["decode_ms_1"] == {"median": 10, "times_better": None}
    assert summary["keras_mamba2"]["decode_gb_per_s_1"]["median"] == pytest.approx(0.8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_counted_bytes_are_those_of_the_model(dtype):
    workload = replace(QUICK, dtype=dtype)
    backbone = Mamba2Backbone(**workload.model)
    values = [v.value for v in backbone.weights]
    assert workload.weight_bytes() == sum(value.nbytes for value in values)
    assert workload.state_bytes(3) == backbone.initial_state(3).nbytes
    assert workload.decode_bytes(3) == workload.weight_bytes() + 2 * workload.state_bytes(3)


def test_operations_of_a_prefill_are_about_twice_the_weights():
    weights_without_embedding = FULL.decode_bytes(0) / 4 - FULL.vocabulary_size * FULL.hidden_dim
    assert FULL.prefill_flops(512) / 512 / 2 == pytest.approx(weights_without_embedding, rel=0.2)


def test_quantization_is_measured(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("To be, or not to be, that is the question.\n" * 20)
    file = tmp_path / "found.json"
    quantization.main(text, tokens=60, variant=["float32", "bfloat16"], file=file)
    variants = json.loads(file.read_text())["variants"]
    plain, half = variants["float32"], variants["bfloat16"]
    assert half["weight_bytes"] < 0.51 * plain["weight_bytes"]
    assert half["nats_per_character"] == pytest.approx(plain["nats_per_character"], rel=0.01)
    assert "| float32 | " in capsys.readouterr().out
