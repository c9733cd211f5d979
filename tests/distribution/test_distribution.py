"""Several devices: virtual ones in one process, and two processes with one each."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_mamba2

ROOT = pathlib.Path(__file__).parents[2]
OF_PARTS = ["check_ssd_sequence_parallel", "check_bad_meshes_are_refused"]
OF_MODELS = [
    "check_training_and_generation",
    "check_collectives",
    "check_memory",
    "check_prefill_of_one_long_sequence",
    "check_hybrids",
    "check_what_devices_cannot_share_is_refused",
    "check_what_devices_cannot_share_of_a_series",
    "check_programs_for_one_device",
]


@pytest.mark.parametrize(
    "checks",
    [
        pytest.param(OF_PARTS, id="parts"),
        pytest.param(OF_MODELS, id="models", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_the_numbers_of_one(checks):
    result = subprocess.run(
        [sys.executable, "-m", "tests.distribution.on_eight_devices", *checks],
        cwd=ROOT,
        env=os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == checks


@pytest.mark.slow
def test_the_guide_to_several_devices_runs_on_eight(without_flags):
    command = [sys.executable, str(ROOT / "guides" / "distribute.py")]
    # The guide asks for eight devices where nobody has set flags, as a reader has not.
    done = subprocess.run(command, env=without_flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 devices" in done.stdout


def run_together(num_processes, folder, epoch_to_die_in=""):
    """Results of processes that train one model; the last dies in an epoch, if one is given."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for i in range(num_processes):
        arguments = [str(port), str(num_processes), str(i), str(folder)]
        arguments += [epoch_to_die_in] if epoch_to_die_in and i == num_processes - 1 else []
        command = [sys.executable, "-m", "tests.distribution.two_processes", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, **pipes))
    return [(process.communicate(timeout=300), process.returncode) for process in processes]


def losses_of(results):
    for (_, errors), returncode in results:
        assert returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for (output, _), _ in results]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    [losses] = losses_of(run_together(1, folder))
    return losses, np.load(folder / "weights.npz")


@pytest.mark.slow
def test_a_dead_process_stops_the_others_and_together_they_go_on(uninterrupted, tmp_path):
    losses, weights = uninterrupted
    (_, errors), survived = run_together(2, tmp_path, epoch_to_die_in="2")[0]
    assert survived not in (0, -signal.SIGKILL)
    assert "another task died" in errors or "closed by peer" in errors, errors[-3000:]
    resumed = losses_of(run_together(2, tmp_path))
    for others in resumed:  # both see the loss of all rows
        np.testing.assert_allclose(others, losses[2:], rtol=1e-5)
    together = np.load(tmp_path / "weights.npz")
    for name, weight in weights.items():
        # Adam's steps: the sign of a gradient near zero is chance, and a step is 0.01 at most.
        error = np.abs(together[name] - weight)
        assert error.max() < 0.09
        assert np.mean(error > 1e-3) < 0.02


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 190 MB, in many tensors: a folder with each format, and its weights."""
    keras.utils.set_random_seed(0)
    experts = {"kind": "mixture_of_experts", "gated": False, "activation": "squared_relu"}
    experts |= {"scoring": "sigmoid", "intermediate_dim": 128, "num_experts": 16}
    shared = {"kind": "mlp", "gated": False, "activation": "squared_relu"}
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=1024,
        hidden_dim=256,
        blocks=["mamba2", "attention", *["experts+shared_expert"] * 40],
        sublayers={
            "mamba2": {"state_dim": 16, "head_dim": 32, "num_groups": 4},
            "attention": {"num_query_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
            "experts": {**experts, "num_experts_per_token": 2},
            "shared_expert": {**shared, "intermediate_dim": 128},
        },
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("large")
    keras_mamba2.Mamba2CausalLM(backbone).export_to_transformers(folder / "checkpoint")
    backbone.save_to_preset(folder / "preset")
    return folder, backbone.get_weights()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "dtype"),
    [("checkpoint", "float32"), ("checkpoint", "bfloat16"), ("preset", "bfloat16")],
)
def test_weights_are_loaded_a_tensor_at_a_time(large, files, dtype):
    """The host never has the whole model beside its devices, nor has a device."""
    folder, weights = large
    result = subprocess.run(
        [sys.executable, "-m", "tests.distribution.loading", str(folder / files), dtype],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    total, on_device = found["total"], found["on_device"]
    assert total < 1.01 * sum(w.size for w in weights) * {"float32": 4, "bfloat16": 2}[dtype]
    sums = [np.abs(w.astype("float64")).sum() for w in weights]
    np.testing.assert_allclose(found["sums"], sums, rtol=2e-3)  # of bfloat16
    assert set(found["experts"]) == {"P('model', 'batch', None)"}
    assert on_device[-1] < 1.06 * total / 8  # each has the routers whole, in float32
    # The memory of these devices is the host's.
    assert found["peak"] < sum(on_device) + 4 * found["largest"] + 24e6
