"""Experts in int8 and int4: what `quantize` makes of them, and that it is saved."""

import keras
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2._compat.keras_layers import flatten_layers
from keras_mamba2.layers import MixtureOfExperts
from keras_mamba2.layers.experts_projection import ExpertsProjection
from keras_mamba2.ops.rounding import restored
from tests import reference

EXPERTS = {"intermediate_dim": 8, "num_experts": 8, "num_experts_per_token": 2}
# Of the logits' root mean square, measured, times two.
ERRORS = {"int8": 0.06, "int4": 0.7}
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
    return [x for x in flatten_layers(lm.backbone) if isinstance(x, MixtureOfExperts)]


def matrices(layer):
    return [part for part in layer.projections if isinstance(part, ExpertsProjection)]


@pytest.fixture(scope="module", params=["int8", pytest.param("int4", marks=pytest.mark.slow)])
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def lm(mode):
    lm = model()
    lm.quantize(mode)
    lm.compile(sampler="greedy")
    return lm


def test_every_expert_and_no_router_is_rounded(lm, mode):
    assert len(experts_of(lm)) == 3
    for layer in experts_of(lm):
        assert layer.router.dtype == "float32"
        assert len(matrices(layer)) == (3 if layer.gated else 2)
        for part in matrices(layer):
            assert part.quantization_mode == mode
            assert part.kernel.dtype == "int8"
            e, n_in, n_out = part.kernel_shape
            assert tuple(part.kernel.shape) == (e, n_in, n_out if mode == "int8" else n_out / 2)


@pytest.mark.parametrize("t", [1, 3, 20], ids=["sliced", "gathered", "sorted"])
def test_outputs_are_those_of_the_rounded_weights(lm, t):
    """However many tokens there are, and so whichever way the products are computed."""
    x = np.random.default_rng(0).normal(size=(1, t, 16)).astype("float32")
    for layer in experts_of(lm):
        if layer.latent_dim is not None:  # whose projections are rounded in another way
            continue
        exact = MixtureOfExperts.from_config({**layer.get_config(), "dtype": "float32"})
        exact.build((None, None, 16))
        for ours, theirs in zip(matrices(layer), matrices(exact), strict=True):
            theirs.kernel.assign(restored(ours._as_stored(), "float32"))
        exact.router.assign(layer.router)
        y, truth = np.asarray(layer(x)), np.asarray(exact(x))
        np.testing.assert_allclose(y, truth, atol=1e-5 * np.abs(truth).max())


def test_logits_stay_near(lm, mode):
    truth, found = (np.asarray(each(INPUTS)) for each in (model(), lm))
    error = np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2))
    assert 0 < error < ERRORS[mode]


def test_it_is_saved_and_goes_on(lm, mode, tmp_path):
    logits = np.asarray(lm(INPUTS))
    lm.save_to_preset(tmp_path / "preset")
    lm.save(tmp_path / "model.keras")
    again = keras_mamba2.Mamba2CausalLM.from_preset(str(tmp_path / "preset"), preprocessor=None)
    for loaded in (again, keras.saving.load_model(tmp_path / "model.keras")):
        np.testing.assert_array_equal(np.asarray(loaded(INPUTS)), logits)
        parts = [part for layer in experts_of(loaded) for part in matrices(layer)]
        assert {part.quantization_mode for part in parts} == {mode}


@pytest.mark.slow
def test_generation_is_the_argmax_of_the_whole(lm):
    ids = [5, 9, 3]
    for _ in range(4):
        inputs = {"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)), "int32")}
        ids.append(int(np.asarray(lm(inputs))[0, -1].argmax()))
    generator = lm.make_generate_function()
    [new] = generator.generate([np.array(ids[:3])], np.array([4]), ())
    assert new.tolist() == ids[3:]


@pytest.mark.parametrize("filters", ["experts_up", lambda layer: layer.name == "experts_up"])
def test_filters_count_for_experts_too(filters):
    lm = model()
    lm.quantize("int8", filters=filters)
    layers = flatten_layers(lm.backbone)
    assert {layer.name for layer in layers if layer.quantization_mode} == {"experts_up"}


def test_a_loaded_model_is_quantized_further(tmp_path):
    lm = model()
    lm.quantize("int8", filters="experts_up")
    lm.backbone.save_to_preset(tmp_path / "first")
    loaded = keras_mamba2.Mamba2HybridBackbone.from_preset(str(tmp_path / "first"))
    with pytest.raises(ValueError, match="experts_up' is already quantized"):
        loaded.quantize("int4", filters="experts")
    for backbone in (lm.backbone, loaded):
        backbone.quantize("int4", filters="experts_(gate|down)")
    loaded.save_to_preset(tmp_path / "second")
    again = keras_mamba2.Mamba2HybridBackbone.from_preset(str(tmp_path / "second"))
    expected = {w.path: np.asarray(w) for w in lm.backbone.weights}
    for other in (loaded, again):
        values = {w.path: np.asarray(w) for w in other.weights}
        assert set(values) == set(expected)
        assert all(np.array_equal(values[path], expected[path]) for path in expected)


@pytest.mark.slow
def test_other_modes_leave_experts_as_they_are():
    lm = model()
    lm.quantize("float8")
    parts = [part for layer in experts_of(lm) for part in matrices(layer)]
    assert {part.quantization_mode for part in parts} == {None}
    assert {part.kernel.dtype for part in parts} == {"float32"}


def test_groups_of_int4_are_those_of_the_configuration(tmp_path):
    """The last group is smaller; a loaded model has the same."""
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=8,
        hidden_dim=16,
        blocks=["mixture_of_experts"],
        sublayers={"mixture_of_experts": EXPERTS},
    )
    backbone.quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=6))
    up = backbone.blocks[0].projections[1]
    assert up.kernel_scale.shape == up.kernel_zero.shape == (8, 3, 8)  # 16 inputs
    backbone.save_to_preset(tmp_path / "preset")
    again = keras_mamba2.Mamba2HybridBackbone.from_preset(str(tmp_path / "preset"))
    for ours, theirs in zip(backbone.weights, again.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
