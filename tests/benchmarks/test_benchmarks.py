"""The whole benchmark at tiny shapes, and the arithmetic behind its table."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks import checkpoint
from benchmarks import gguf_tensors
from benchmarks import prompts
from benchmarks import quantization
from benchmarks import subject
from benchmarks.__main__ import SUBJECTS
from benchmarks.adapters import ADAPTERS
from benchmarks.report import MACHINE
from benchmarks.report import OURS
from benchmarks.report import summarize
from benchmarks.report import table
from benchmarks.rounds import HERE
from benchmarks.rounds import run_subject
from benchmarks.subject import decode_ms
from benchmarks.subject import measure_prefill
from benchmarks.workload import FULL
from benchmarks.workload import QUICK
from keras_mamba2 import Mamba2Backbone
from keras_mamba2 import Mamba2CausalLM

# The others differ from these in their dtype.
MEASURED = [name for name in SUBJECTS if "bfloat16" not in name]


# Whatever needs the whole run is slow.
@pytest.fixture(scope="module", params=[pytest.param("run", marks=pytest.mark.slow)])
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    shutil.copy(HERE / "README.md", folder)
    command = ["-m", "benchmarks", "--quick", "--rounds=1", "--name=try", f"--folder={folder}"]
    command += ["--batch-size=1", "--batch-size=2"]
    for size, subjects in (("370m", (MACHINE, OURS)), ("130m", MEASURED)):
        options = [f"--size={size}", *(f"--subject={name}" for name in subjects)]
        subprocess.run([sys.executable, *command, *options], cwd=HERE.parent, check=True)
    return folder


@pytest.fixture
def results(folder) -> dict:
    return json.loads((folder / "results" / "try_130m.json").read_text())


@pytest.mark.parametrize("subject", MEASURED)
def test_every_subject_is_measured_or_absent(results, subject):
    found = results["rounds"][0][subject]
    packages = ADAPTERS[subject].adapter.packages if subject in ADAPTERS else ()
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
    tables = re.compile("<!-- (sizes|table): begin -->.*?<!-- .*?: end -->", re.DOTALL)
    assert tables.sub("", after) == tables.sub("", before)


def test_every_size_has_a_line(folder):
    lines = (folder / "README.md").read_text().splitlines()
    for what in ("decode, ms/token", "prefill 512, tokens/s"):
        for size in ("130M", "370M"):
            assert any(line.startswith(f"| {size} {what} |") for line in lines)


def test_an_unknown_size_is_named():
    command = [sys.executable, "-m", "benchmarks", "--size=131m"]
    found = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert found.returncode == 2
    assert "131m" in found.stderr


def test_what_takes_too_long_is_left_out(monkeypatch):
    class Slow:
        seconds = 0.0

        def prefill(self, token_ids):
            self.seconds += 0.01 * token_ids.shape[1]

        def decode(self, num_tokens):
            self.seconds += 0.05 * num_tokens

    slow = Slow()

    def seconds(function):
        before = slow.seconds
        function()
        return slow.seconds - before

    monkeypatch.setattr(subject, "seconds", seconds)

    workload = replace(QUICK, limit_s=1.0, budget_s=0.3, prefill_tokens=(4, 8, 200, 400))
    assert set(measure_prefill(slow, workload)) == {
        f"prefill_{unit}_per_s_{t}" for unit in ("tokens", "gflop") for t in (4, 8)
    }
    assert decode_ms(slow, workload, 1) == pytest.approx(50)
    assert decode_ms(slow, replace(workload, limit_s=0.1), 1) is None


@pytest.mark.parametrize("kind", ["transformers", "gguf"])
def test_all_subjects_get_the_same_weights(tmp_path, kind):
    """Names of both formats by a model of transformers, and what llama.cpp stores otherwise."""
    transformers = pytest.importorskip("transformers")
    checkpoint.main(tmp_path, json.dumps(asdict(QUICK)))
    model = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path)
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    written = dict(checkpoint.random_weights(QUICK))
    assert set(expected) == {*written, "lm_head.weight"}
    if kind == "transformers":
        for name, value in written.items():
            np.testing.assert_array_equal(expected[name], value)
        return
    config = json.loads((tmp_path / "config.json").read_text())
    found = dict(gguf_tensors.tensors(config, written.items()))
    assert len(found) == len(written)
    np.testing.assert_array_equal(
        found["blk.1.ssm_a"][:, 0],
        -np.exp(expected["backbone.layers.1.mixer.A_log"]),
    )
    conv = "backbone.layers.0.mixer.conv1d.weight"
    np.testing.assert_array_equal(found["blk.0.ssm_conv1d.weight"], expected[conv][:, 0])


@pytest.mark.llama_cpp
@pytest.mark.skipif(not find_spec("llama_cpp"), reason="no llama-cpp-python")
def test_llama_cpp_computes_the_same(tmp_path):
    import jax

    from benchmarks.llama_cpp_model import LlamaCpp

    checkpoint.main(tmp_path, json.dumps(asdict(QUICK)))
    backbone = Mamba2Backbone.from_preset(str(tmp_path))
    lm = Mamba2CausalLM(backbone)
    ids = np.random.default_rng(0).integers(0, QUICK.vocabulary_size, (2, 24))
    expected = np.asarray(jax.jit(lm.score)(ids))[:, -1]
    model = LlamaCpp(tmp_path / "bfloat16.gguf")
    model.start(2)
    model.advance(ids[:, :20])
    for i in range(20, 24):
        found = model.advance(ids[:, i : i + 1])
    # bfloat16 against float32.
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_plot_is_small(folder):
    assert 0 < (folder / "results" / "try.png").stat().st_size < 100_000


def first_row(results) -> dict[str, str]:
    names, _, cells, *_ = (line.strip("|").split("|")[1:] for line in table(results).splitlines())
    return {name.strip(): text.strip() for name, text in zip(names, cells, strict=True)}


def test_missing_package_is_reported_as_absent(results, tmp_path):
    (tmp_path / "mamba2_jax.py").write_text("raise ModuleNotFoundError('no mamba2_jax')")
    command = [sys.executable, "-m", "benchmarks.subject", "mamba2-jax", "--batch-size=1"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    printed = subprocess.check_output(command, cwd=HERE.parent, env=env)
    found = json.loads(printed)
    assert found == {"absent": "no mamba2_jax"}

    results["rounds"][0]["mamba2-jax"] = found
    results["summary"] = summarize(results)
    assert first_row(results)["mamba2-jax"] == "absent"


def test_failure_is_recorded_and_does_not_end_the_run(results):
    failure = run_subject(["no-such-subject", "--batch-size=1"])
    assert failure["failed"].endswith("KeyError: 'no-such-subject'")
    results["rounds"][0]["transformers"] = failure
    results["summary"] = summarize(results)
    assert first_row(results)["transformers"] == "failed"


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
    ours = summary["keras_mamba2"]["decode_ms_1"]
    assert ours == {"median": 10, "range": [10, 30], "times_better": None}
    assert summary["keras_mamba2"]["decode_gb_per_s_1"]["median"] == pytest.approx(0.8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_counted_bytes_are_those_of_the_model(dtype):
    workload = replace(QUICK, dtype=dtype)
    backbone = Mamba2Backbone(**workload.model)
    if dtype == "int8":
        backbone.quantize("int8")
    values = [v.value for v in backbone.weights if not v.path.endswith("_scale")]
    assert workload.weight_bytes() == sum(value.nbytes for value in values)
    assert workload.state_bytes(3) == backbone.initial_state(3).nbytes
    assert workload.decode_bytes(3) == workload.weight_bytes() + 2 * workload.state_bytes(3)


def test_operations_of_a_prefill_are_about_twice_the_weights():
    weights_without_embedding = FULL.decode_bytes(0) / 4 - FULL.vocabulary_size * FULL.hidden_dim
    assert FULL.prefill_flops(512) / 512 / 2 == pytest.approx(weights_without_embedding, rel=0.2)


@pytest.mark.slow
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


@pytest.mark.slow
def test_prompts_of_all_lengths_are_measured_and_plotted(tmp_path):
    prompts.main(longest=17, step=8, rounds=1, quick=True, folder=tmp_path)
    results = json.loads((tmp_path / "prompts.json").read_text())
    assert results["lengths"] == [1, 8, 16]
    assert all(0 < s < 60 for taken in results["seconds"].values() for s in taken)
    assert (tmp_path / "prompts.png").stat().st_size > 1000
