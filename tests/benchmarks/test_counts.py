"""Regressions that need no clock: counts of the compiled programs against the recorded ones."""

import copy
import json
import subprocess
import sys

import pytest

from benchmarks.counts import MODEL
from benchmarks.counts import RECORDED
from benchmarks.counts import UPDATE
from benchmarks.counts import compare
from keras_mamba2 import Mamba2Backbone


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORDED.read_text())


@pytest.fixture(scope="module", params=[pytest.param("run", marks=pytest.mark.slow)])
def found(tmp_path_factory, without_flags):
    """In a process of its own, where nothing has been compiled before."""
    file = tmp_path_factory.mktemp("counts") / "counts.json"
    command = [sys.executable, "-m", "benchmarks.counts", "--update", f"--file={file}"]
    subprocess.run(command, cwd=RECORDED.parents[2], env=without_flags, check=True)
    return json.loads(file.read_text())


def test_counts_are_those_recorded(found, recorded):
    differences = compare(found, recorded)
    assert not differences, "\n".join(differences)


def test_counts_are_those_of_the_program(found):
    counts = found["counts"]
    backbone = Mamba2Backbone(**MODEL)
    model_bytes = sum(v.value.nbytes for v in backbone.weights) + backbone.initial_state(2).nbytes
    assert counts["decode"]["argument_bytes"] == pytest.approx(model_bytes, rel=1e-3)
    assert counts["decode"]["loops"] == 1
    assert counts["prefill"]["loops"] == MODEL["num_layers"]  # one scan over chunks a layer
    assert counts["generate"]["compilations"] <= 6


@pytest.mark.parametrize(
    ("key", "factor", "word"),
    [
        ("flops", 1.001, "grew"),
        ("flops", 0.999, "fell"),
        ("temporary_bytes", 1.02, None),
        ("temporary_bytes", 1.04, "grew"),
        ("temporary_bytes", 0.9, "fell"),
    ],
)
def test_a_change_is_named_with_the_command_that_records_it(recorded, key, factor, word):
    changed = copy.deepcopy(recorded)
    changed["counts"]["ssd"][key] = round(changed["counts"]["ssd"][key] * factor)
    differences = compare(changed, recorded)
    if word is None:
        assert differences == []
    else:
        assert differences[0].startswith(f"ssd: {key} {word} from")
        assert UPDATE in differences[-1]


@pytest.mark.parametrize(("factor", "words"), [(1.2, []), (0.5, []), (1.3, ["grew"])])
def test_another_version_of_jax_is_compared_loosely(recorded, factor, words):
    changed = copy.deepcopy(recorded) | {"jax": "9.9.9"}
    changed["counts"]["ssd"]["flops"] = round(changed["counts"]["ssd"]["flops"] * factor)
    differences = compare(changed, recorded)
    assert [line.split()[2] for line in differences[:-1]] == words
    assert all("not 9.9.9" in line for line in differences[-1:])


def test_what_is_not_on_both_sides_is_named(recorded):
    changed = copy.deepcopy(recorded)
    changed["counts"]["new"] = {"flops": changed["counts"]["ssd"].pop("flops")}
    assert compare(changed, recorded)[:2] == [
        "ssd: flops is no longer counted",
        "new: flops is not recorded",
    ]
