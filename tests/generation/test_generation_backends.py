"""Generation on the backends that this process does not run: the text of JAX."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_mamba2
from tests import reference
from tests.generation.on_backend import results
from tests.generation.on_backend import results_of_hybrid

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected(preset_folder):
    return results(preset_folder)


@pytest.fixture(scope="module")
def expected_of_hybrid(hybrid_folder):
    return results_of_hybrid(hybrid_folder)


@pytest.fixture(scope="module")
def hybrid_folder(tmp_path_factory, byte_tokenizer):
    """A preset with every kind of layer."""
    keras.utils.set_random_seed(0)
    heads = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_token": 2, "intermediate_dim": 16}
    shared = {
        "attention": {**heads, "head_dim": 16, "rotary_dim": 16},
        "mlp": {"intermediate_dim": 48},
    }
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=257,
        hidden_dim=32,
        blocks=["mamba2", "attention", "moe", "mamba2+rotary", "mlp", "shared>mamba2"],
        sublayers={
            "mamba2": {"state_dim": 8, "head_dim": 8, "num_groups": 2, "chunk_size": 8},
            "attention": {**heads, "conv_kernel_size": 3},
            "rotary": {"kind": "attention", **heads, "rotary_dim": 4},
            "moe": {"kind": "mixture_of_experts", **experts},
            "mlp": {"intermediate_dim": 48},
            "shared": {"kind": "shared_transformer", **shared},
        },
    )
    reference.randomize(backbone)
    preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(byte_tokenizer, sequence_length=32)
    folder = tmp_path_factory.mktemp("presets") / "hybrid"
    keras_mamba2.Mamba2CausalLM(backbone, preprocessor).save_to_preset(folder)
    return folder


def on(backend, kind, folder):
    done = subprocess.run(
        [sys.executable, "-m", "tests.generation.on_backend", kind, str(folder)],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in ("rows", "packed"):
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            about = name == "perplexity" or "loss" in name
            assert found[name] == (pytest.approx(value, rel=1e-4) if about else value), name


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_generation_is_that_of_jax(backend, preset_folder, expected):
    assert_same(on(backend, "pure", preset_folder), expected)


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_hybrids_are_those_of_jax(backend, hybrid_folder, expected_of_hybrid):
    assert_same(on(backend, "hybrid", hybrid_folder), expected_of_hybrid)
