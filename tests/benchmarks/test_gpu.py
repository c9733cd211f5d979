"""The command for GPUs, at tiny shapes on a CPU and without TensorFlow."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from benchmarks.gpu import ENVIRONMENTS
from benchmarks.gpu import ONE_GRAPH
from benchmarks.gpu import SUBJECTS
from benchmarks.report import LOOP
from benchmarks.report import OURS
from benchmarks.report import table
from benchmarks.rounds import HERE
from benchmarks.workload import SIZES
from benchmarks.workload import of_size
from keras_mamba2.conversion import constructor_arguments
from keras_mamba2.preset_files import Preset

COUNTS = ("host_transfers", "command_buffers")  # none is a figure too
# The others are measured by `test_benchmarks.py` too.
MEASURED = ("machine", OURS, f"{LOOP}, one graph", "mamba_ssm")


# Whatever needs the whole run is slow.
@pytest.fixture(scope="module", params=[pytest.param("run", marks=pytest.mark.slow)])
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    for missing in ("tensorflow", "matplotlib"):
        text = f"raise ModuleNotFoundError('no {missing}', name='{missing}')"
        (folder / f"{missing}.py").write_text(text)
    command = [sys.executable, "-m", "benchmarks.gpu", "--platform=cpu", "--quick"]
    command += ["--size=130m", "--batch-size=1", "--rounds=1", f"--folder={folder}"]
    command += [f"--subject={name}" for name in MEASURED]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(command, cwd=HERE.parent, env=os.environ | {"PYTHONPATH": path}, check=True)
    return json.loads((folder / "cpu_130m.json").read_text())


@pytest.fixture
def found(results):
    (found,) = results["rounds"]
    return found


def test_every_subject_is_measured_or_absent(found):
    assert tuple(found) == MEASURED
    for name, figures in found.items():
        if name == "mamba_ssm" and not find_spec(name):
            assert set(figures) == {"absent"}
        else:
            assert all(value > 0 for key, value in figures.items() if key not in COUNTS)


def test_the_decode_loop_stays_on_the_device(found):
    loop = found[f"{LOOP}, one graph"]
    assert (loop["loops"], loop["host_transfers"]) == (1, 0)


def test_figures_are_also_shares_of_ceilings(results, found):
    share = found[OURS]["decode_gb_per_s_1"] / found["machine"]["read_gb_per_s"]
    assert results["summary"][OURS]["decode_gb_per_s_1"]["median"] == pytest.approx(share)
    assert table(results).splitlines()[0] == f"| | {OURS} | mamba_ssm |"


def test_both_ways_of_running_our_loop_are_measured(results):
    assert {SUBJECTS[name] for name in ENVIRONMENTS} == {OURS, LOOP}
    assert all(variables is ONE_GRAPH for variables in ENVIRONMENTS.values())


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_those_of_the_presets(size):
    workload = of_size(size)
    arguments = constructor_arguments(Preset(f"mamba2_{size}_en").config)
    for name, value in workload.model.items():
        if name in arguments:
            assert arguments[name] == value
    assert {"vocabulary_size", "num_layers", "hidden_dim"} <= arguments.keys()
