"""Experts in int8: what `quantize` makes of them, and that it is saved."""

import keras
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2.layers import MixtureOfExperts
from tests import reference

EXPERTS = {"intermediate_dim": 8, "num_experts": 8, "num_experts_per_token": 2}
KERNELS = "experts_gate", "experts_up", "experts_down"
INPUTS = {"token_ids": np.arange(20)[None], "padding_mask": np.ones((1, 20), "int32")}


def model(dtype="float32"):
    """With gated and plain experts, of a latent size and alone, in one block with an MLP too."""
    keras.utils.set_random_seed(0)
    plain = {**EXPERTS, "kind": "mixture_of_experts"}
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=64,
        hidden_dim=16,
        blocks=["mamba2", "gated", "latent", "gated+mlp"],
        sublayers={
            "mamba2": {"state_dim": 4, "head_dim": 8},
            "gated": plain,
            "latent": {**plain, "latent_dim": 12, "scoring": "sigmoid", "gated": False},
            "mlp": {"intermediate_dim": 8},
        },
        dtype=dtype,
    )
    reference.randomize(backbone)
    return keras_mamba2.Mamba2CausalLM(backbone)


def experts_of(lm):
    return [x for x in lm.backbone._flatten_layers() if isinstance(x, MixtureOfExperts)]


@pytest.fixture(scope="module")
def lm():
    lm = model()
    lm.quantize("int8")
    lm.compile(sampler="greedy")
    return lm


def test_every_expert_and_no_router_is_rounded(lm):
    assert len(experts_of(lm)) == 3
    for layer in experts_of(lm):
        assert layer.router.dtype == "float32"
        kernels = [getattr(layer, name) for name in KERNELS if getattr(layer, name) is not None]
        assert {kernel.dtype for kernel in kernels} == {"int8"}
        assert len(layer.scales) == len(kernels) == (3 if layer.gated else 2)


@pytest.mark.parametrize("t", [1, 3, 20], ids=["sliced", "gathered", "sorted"])
def test_outputs_are_those_of_the_rounded_weights(lm, t):
    """However many tokens there are, and so whichever way the products are computed."""
    x = np.random.default_rng(0).normal(size=(1, t, 16)).astype("float32")
    for layer in experts_of(lm):
        if layer.latent_dim is not None:  # whose projections are rounded in another way
            continue
        exact = MixtureOfExperts.from_config({**layer.get_config(), "dtype": "float32"})
        exact.build((None, None, 16))
        for name in KERNELS:
            if getattr(layer, name) is not None:
                kernel = np.asarray(getattr(layer, name), "float32")
                getattr(exact, name).assign(kernel * np.asarray(layer.scales[name]))
        exact.router.assign(layer.router)
        y, truth = np.asarray(layer(x)), np.asarray(exact(x))
        np.testing.assert_allclose(y, truth, atol=1e-5 * np.abs(truth).max())


def test_logits_stay_near(lm):
    truth, found = (np.asarray(each(INPUTS)) for each in (model(), lm))
    assert np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2)) < 0.06  # measured, times two


def test_it_is_saved_and_goes_on(lm, tmp_path):
    logits = np.asarray(lm(INPUTS))
    lm.save_to_preset(tmp_path / "preset")
    lm.save(tmp_path / "model.keras")
    again = keras_mamba2.Mamba2CausalLM.from_preset(str(tmp_path / "preset"), preprocessor=None)
    for loaded in (again, keras.saving.load_model(tmp_path / "model.keras")):
        np.testing.assert_array_equal(np.asarray(loaded(INPUTS)), logits)
        assert all(layer.quantization_mode == "int8" for layer in experts_of(loaded))


@pytest.mark.slow
def test_generation_is_the_argmax_of_the_whole(lm):
    ids = [5, 9, 3]
    for _ in range(4):
        inputs = {"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)), "int32")}
        ids.append(int(np.asarray(lm(inputs))[0, -1].argmax()))
    generator = lm.make_generate_function()
    [new] = generator.generate([np.array(ids[:3])], np.array([4]), ())
    assert new.tolist() == ids[3:]


@pytest.mark.parametrize("filters", ["in_proj", lambda layer: layer.name == "in_proj"])
def test_filters_count_for_experts_too(filters):
    lm = model()
    lm.quantize("int8", filters=filters)
    assert {layer.quantization_mode for layer in experts_of(lm)} == {None}


@pytest.mark.slow
def test_other_modes_leave_experts_as_they_are():
    lm = model()
    lm.quantize("int4")
    assert {layer.experts_up.dtype for layer in experts_of(lm)} == {"float32"}
