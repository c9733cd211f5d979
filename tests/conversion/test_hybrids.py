"""Every family of hybrids: loaded from transformers, as near to float64 as it, and back again."""

import functools

import jax
import keras
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2 import conversion
from keras_mamba2.conversion import describe
from tests.conversion import hybrids
from tests.conversion.checkpoints import assert_same_weights

EPS = np.finfo("float32").eps
cases = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in hybrids.FAMILIES else pytest.mark.slow)
        for name in hybrids.CASES
    ],
)
families = pytest.mark.parametrize("name", hybrids.FAMILIES)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def folder(name, seed=0):
        path = tmp_path_factory.mktemp("hybrids") / "model"
        hybrids.random_model(name, seed).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="module")
def lm_of(folder_of):
    @functools.cache
    def lm(name):
        lm = keras_mamba2.Mamba2CausalLM.from_preset(folder_of(name), preprocessor=None)
        lm.compile(sampler="greedy")
        return lm

    return lm


def random_ids(t=37, seed=0):
    return np.random.default_rng(seed).integers(64, size=(2, t))


def rms(a):
    return np.sqrt(np.mean(np.square(a, dtype="float64")))


@cases
def test_float32_is_as_near_to_the_truth_as_transformers(name, folder_of, lm_of):
    lm, ours, theirs = lm_of(name), [], []
    variables = lm.trainable_variables, lm.non_trainable_variables
    forward = jax.jit(lm.stateless_call)
    for seed in (2, 1, 0):
        ids, model = random_ids(seed=seed), hybrids.random_model(name, seed)
        truth = hybrids.logits_in_float64(model, ids)
        conversion.load_weights(lm.backbone, folder_of(name, seed))
        values = [[v.value for v in kind] for kind in variables]
        found, _ = forward(*values, {"token_ids": ids, "padding_mask": np.ones_like(ids)})
        ours.append(rms(found - truth))
        theirs.append(rms(hybrids.logits(model, ids) - truth))
        assert ours[-1] < 1e-4 * rms(truth)
    assert rms(ours) <= 2 * rms(theirs)


@families
def test_score_is_the_call(name, lm_of):
    """With the multipliers of the embeddings, and with what shared blocks see of them."""
    lm, ids = lm_of(name), random_ids(t=9)
    expected = jax.jit(lm)({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    np.testing.assert_allclose(jax.jit(lm.score)(ids), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@cases
def test_greedy_tokens_are_those_of_the_truth(name, lm_of):
    """The argmax of float64 logits, computed anew for the whole text at each token."""
    model, prompt = hybrids.random_model(name), random_ids(t=11)[:1]
    new = lm_of(name).make_generate_function().generate([prompt[0]], np.array([64]), ())[0]
    text = np.concatenate([prompt[0], new])
    truth = hybrids.logits_in_float64(model, text[None])[0, len(prompt[0]) - 1 : -1]
    np.testing.assert_array_equal(truth.argmax(axis=-1), new)


@pytest.mark.slow
@families
def test_rows_of_a_batch_are_what_they_are_alone(name, lm_of):
    generator = lm_of(name).make_generate_function()
    prompts = [random_ids(t=t, seed=t)[0] for t in (1, 3, 29)]
    limits = np.array([12, 20, 6])
    together = generator.generate(list(prompts), limits, ())
    for prompt, limit, found in zip(prompts, limits, together, strict=True):
        alone = generator.generate([prompt], np.array([limit]), ())[0]
        np.testing.assert_array_equal(found, alone)


@families
def test_export_and_back(name, lm_of, folder_of, tmp_path):
    """There and back with identical weights, and the same logits in transformers."""
    import transformers

    lm = lm_of(name)
    lm.export_to_transformers(tmp_path / "exported")
    again = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "exported", preprocessor=None)
    assert_same_weights(lm.backbone, again.backbone)
    config = again.backbone.get_config() | {"name": lm.backbone.name}
    assert config == lm.backbone.get_config()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    ids = random_ids()
    expected = hybrids.logits(hybrids.random_model(name), ids)
    np.testing.assert_allclose(
        hybrids.logits(theirs, ids), expected, rtol=0, atol=64 * EPS * np.abs(expected).max()
    )


@families
def test_a_preset_and_back(name, lm_of, tmp_path):
    lm = lm_of(name)
    lm.save_to_preset(tmp_path / "preset")
    again = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "preset", preprocessor=None)
    assert_same_weights(lm.backbone, again.backbone)
    backbone = keras_mamba2.Mamba2HybridBackbone.from_preset(tmp_path / "preset")
    assert_same_weights(lm.backbone, backbone)


@families
def test_weights_left_over_or_missing_are_listed(name, folder_of, tmp_path):
    from safetensors.torch import load_file
    from safetensors.torch import save_file

    model = hybrids.random_model(name)
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[-1]
    tensors["model.layers.0.extra.weight"] = tensors.pop(lost)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"extra.weight(.|\n)*{lost}"):
        keras_mamba2.Mamba2HybridBackbone.from_preset(tmp_path / "model")


@cases
def test_the_description_counts_what_is_there(name, folder_of, lm_of):
    lines, backbone = describe(folder_of(name)), lm_of(name).backbone
    assert lines["parameters"].startswith(f"{backbone.count_params():,}")
    assert "bytes a token for attention" in lines["state"]


def test_a_backbone_of_the_other_class_says_which(folder_of):
    with pytest.raises(ValueError, match="is a Mamba2HybridBackbone, not a Mamba2Backbone"):
        keras_mamba2.Mamba2Backbone.from_preset(folder_of("bamba"))


class TestWhereTransformersDiffersFromWhatTheWeightsWereTrainedWith:
    """The original code is followed."""

    def test_nemotron_has_no_least_step_size(self, folder_of):
        """transformers 5 takes `time_step_min` for a limit, though the configuration has none."""
        backbone = keras_mamba2.Mamba2HybridBackbone.from_preset(folder_of("nemotron"))
        mixer = backbone.blocks[0].sublayer.sublayers[0]
        assert mixer.time_step_limit == (0.0, None)

    def test_zamba_has_no_least_step_size(self, folder_of):
        backbone = keras_mamba2.Mamba2HybridBackbone.from_preset(folder_of("zamba, one block"))
        assert backbone.blocks[0].sublayer.sublayers[0].time_step_limit == (0.0, None)

    @pytest.mark.slow
    def test_step_sizes_are_limited_in_steps_too(self, lm_of):
        """Its cached step does not clip them: there a text continued is not the whole."""
        backbone, ids = lm_of("granite, rotary").backbone, random_ids(t=9)
        whole, _ = backbone.call_with_state(ids)
        y, state = backbone.call_with_state(ids[:, :5], backbone.initial_state(2, 9))
        found = [y]
        for i in range(5, 9):
            y, state = backbone.step(ids[:, i], state)
            found.append(y[:, None])
        np.testing.assert_allclose(
            np.concatenate(found, axis=1), whole, rtol=0, atol=256 * EPS * np.abs(whole).max()
        )


@pytest.mark.parametrize("config", [keras.quantizers.GPTQConfig, keras.quantizers.AWQConfig])
def test_blocks_that_see_the_embeddings_are_not_calibrated(lm_of, config):
    """Keras would run them without, and stop with the model half quantized."""
    lm = lm_of("zamba, two blocks")
    with pytest.raises(ValueError, match="also see the embeddings.*'int8' or 'int4'"):
        lm.quantize(config=config(dataset=["a"], tokenizer=lm))
    assert not any(layer.quantization_mode for layer in lm.backbone.blocks[0].projections)
