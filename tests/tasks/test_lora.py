"""LoRA: only adapters learn, and merging them changes no output."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_mamba2
from keras_mamba2.models import lora

EPS = np.finfo(np.float32).eps
TEXTS = ["to be, or not to be, that is"] * 8
INPUTS = {"token_ids": np.arange(40, 54)[None], "padding_mask": np.ones((1, 14), "int32")}


@pytest.fixture
def lm(preset_folder):
    return keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)


def randomize_adapters(lm, seed=0):
    rng = np.random.default_rng(seed)
    for layer in lora.adapted_projections(lm.backbone):
        for factor in (layer.lora_kernel_a, layer.lora_kernel_b):
            factor.assign(0.3 * rng.normal(size=factor.shape))


def adapted(lm, *args, **kwargs):
    lm.backbone.enable_lora(4, *args, **kwargs)
    randomize_adapters(lm)
    return lm


def logits_of(lm):
    return ops.convert_to_numpy(lm(INPUTS))


def values_of(lm):
    return {v.path: np.array(ops.convert_to_numpy(v.value)) for v in lm.backbone.weights}


def assert_same(values, others):
    assert list(values) == list(others)
    for path, value in values.items():
        assert value.tobytes() == others[path].tobytes(), path


def test_only_adapters_learn(lm):
    lm.backbone.enable_lora(4)
    before = values_of(lm)
    lm.compile(optimizer=keras.optimizers.AdamW(3e-2))
    losses = lm.fit(TEXTS, batch_size=8, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.95 * losses[0]
    for path, value in values_of(lm).items():
        assert (value.tobytes() == before[path].tobytes()) == ("lora_kernel" not in path), path


@pytest.mark.parametrize("names", [["in_proj"], ["out_proj"], ["in_proj", "out_proj"], None])
def test_projections_are_adapted_by_name(lm, names):
    lm.backbone.enable_lora(2, names)
    layers = {v.path.split("/")[-2] for v in lm.trainable_variables}
    assert layers == set(names or ["in_proj", "out_proj"])
    assert len(lm.trainable_variables) == 2 * len(layers) * lm.backbone.num_layers


@pytest.mark.parametrize("names", [["query"], ["in_proj", "token_embedding"], []])
def test_a_name_that_is_no_projection_changes_nothing(lm, names):
    count = len(lm.trainable_variables)
    with pytest.raises(ValueError, match=r"must be some of \['in_proj', 'out_proj'\]. Received"):
        lm.backbone.enable_lora(2, names)
    assert len(lm.trainable_variables) == count


def test_refusals_name_the_remedy(lm):
    with pytest.raises(ValueError, match="`rank` must be a positive integer. Received: rank=0"):
        lm.backbone.enable_lora(0)
    with pytest.raises(ValueError, match="no LoRA adapter to merge"):
        lm.backbone.merge_lora()
    lm.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="enabled already.*`merge_lora"):
        lm.backbone.enable_lora(2)


def test_biases_are_frozen_too(small_backbone_arguments):
    backbone = keras_mamba2.Mamba2Backbone(**small_backbone_arguments, use_bias=True)
    backbone.enable_lora(2)
    assert all("lora_kernel" in v.path for v in backbone.trainable_variables)


@pytest.mark.parametrize("names", [None, ["in_proj"]])
def test_saved_and_loaded(lm, preset_folder, tmp_path, names):
    adapted(lm, names).backbone.save_lora_weights(tmp_path / "new.lora.h5")
    again = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    again.backbone.load_lora_weights(tmp_path / "new.lora.h5")
    assert_same(values_of(lm), values_of(again))
    assert np.array_equal(logits_of(lm), logits_of(again))
    randomize_adapters(again, seed=1)
    again.backbone.load_lora_weights(tmp_path / "new.lora.h5")
    assert_same(values_of(lm), values_of(again))


@pytest.mark.parametrize("other", [{"num_layers": 1}, {"num_layers": 3}, {"hidden_dim": 16}])
def test_adapters_of_another_model_change_nothing(lm, small_backbone_arguments, tmp_path, other):
    adapted(lm).backbone.save_lora_weights(tmp_path / "new.lora.h5")
    backbone = keras_mamba2.Mamba2Backbone(**{**small_backbone_arguments, **other})
    with pytest.raises(ValueError, match="new.lora.h5 holds the adapters of another model"):
        backbone.load_lora_weights(tmp_path / "new.lora.h5")
    assert not lora.adapted_projections(backbone)


def test_adapters_of_other_layers_change_nothing(lm, tmp_path):
    adapted(lm, ["in_proj"]).backbone.save_lora_weights(tmp_path / "new.lora.h5")
    lm.backbone.merge_lora()
    before = values_of(adapted(lm, ["out_proj"]))
    with pytest.raises(ValueError, match=r"of \['in_proj'\], but LoRA is enabled on \['out_proj'"):
        lm.backbone.load_lora_weights(tmp_path / "new.lora.h5")
    assert_same(values_of(lm), before)


def test_an_alpha_is_not_forgotten_in_a_file(lm, tmp_path):
    layers = lora.projections(lm.backbone)
    lora.enable(lm.backbone, {layer: (2, 8) for layer in layers})
    with pytest.raises(ValueError, match="Use `save_peft_adapter`.*rank=2, alpha=8"):
        lm.backbone.save_lora_weights(tmp_path / "new.lora.h5")
    with pytest.raises(ValueError, match="an alpha equal to it"):
        lm.backbone.load_lora_weights(tmp_path / "new.lora.h5")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_changes_no_output(preset_folder, dtype):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, dtype=dtype)
    paths = list(values_of(lm))
    before = logits_of(adapted(lm))
    lm.backbone.merge_lora()
    assert np.array_equal(logits_of(lm), before)
    assert list(values_of(lm)) == paths
    assert len(lm.trainable_variables) == len(lm.variables)


def test_merging_with_mixed_precision_loses_no_bits(lm, preset_folder):
    mixed = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, dtype="mixed_bfloat16")
    truth = logits_of(adapted(lm))
    error = np.abs(logits_of(adapted(mixed)) - truth).max()
    for model in (lm, mixed):
        model.backbone.merge_lora()
    assert_same(values_of(lm), values_of(mixed))
    # The weights are now rounded once, and before the adapter was added to them.
    assert np.abs(logits_of(mixed) - truth).max() <= 2 * error


@pytest.mark.parametrize("ending", ["preset", "model.keras"])
def test_saving_with_mixed_precision_loses_no_bits(preset_folder, tmp_path, ending):
    """What is saved of an adapted model is what `merge_lora` makes of it."""
    mixed = adapted(keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, dtype="mixed_bfloat16"))
    if ending == "preset":
        mixed.save_to_preset(tmp_path / ending)
        saved = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / ending, dtype="mixed_bfloat16")
    else:
        mixed.save(tmp_path / ending)
        saved = keras.models.load_model(tmp_path / ending)
    mixed.backbone.merge_lora()
    assert_same(values_of(saved), values_of(mixed))


def test_an_error_while_merging_loses_no_adapter(lm, monkeypatch):
    expected = logits_of(adapted(lm))
    layers = lora.adapted_projections(lm.backbone)

    def fail(store):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(layers[1], "load_own_variables", fail)
        with pytest.raises(MemoryError):
            lm.backbone.merge_lora()
    assert lora.adapted_projections(lm.backbone) == layers[1:]
    assert np.array_equal(logits_of(lm), expected)
    lm.backbone.merge_lora()
    assert np.array_equal(logits_of(lm), expected)


def test_a_merged_model_generates_is_exported_and_is_adapted_again(lm, tmp_path):
    lm.compile(sampler="greedy")
    plain = lm.generate("hello", max_new_tokens=8)
    adapted(lm)
    text = lm.generate("hello", max_new_tokens=8)
    assert text != plain
    with pytest.raises(ValueError, match="`backbone.merge_lora"):
        lm.export_to_transformers(tmp_path / "exported")
    lm.backbone.merge_lora()
    assert lm.generate("hello", max_new_tokens=8) == text
    lm.export_to_transformers(tmp_path / "exported")
    exported = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "exported")
    assert_same(values_of(lm), values_of(exported))
    assert not np.array_equal(logits_of(adapted(lm)), logits_of(exported))


def test_an_adapter_learns_on_after_weights_are_loaded(lm, tmp_path):
    """Keras saves adapters merged; what it loads into a model with adapters must be trainable."""
    lm.backbone.enable_lora(4)
    lm.compile(optimizer=keras.optimizers.SGD(0.1))
    lm.fit(TEXTS, batch_size=8, verbose=0)
    lm.save_weights(tmp_path / "new.weights.h5")
    expected = logits_of(lm)
    lm.load_weights(tmp_path / "new.weights.h5")
    np.testing.assert_allclose(logits_of(lm), expected, atol=64 * EPS * np.abs(expected).max())
    lm.fit(TEXTS, batch_size=8, verbose=0)
    for layer in lora.adapted_projections(lm.backbone):
        assert np.any(ops.convert_to_numpy(layer.lora_kernel_b.value))


def test_programs_have_the_scale_of_the_adapters_that_are_there(lm):
    """Though other adapters of the same shapes have been compiled with another one."""
    lm.compile(sampler="greedy")
    prompt = {name: array[:, :6] for name, array in INPUTS.items()}

    def generated():
        return lm.generate(prompt, max_new_tokens=20, stop_token_ids=None, return_logprobs=True)[1]

    def adapt(alpha):
        layers = lora.projections_named(lm.backbone, ["in_proj"])
        lora.replace(lm.backbone, dict.fromkeys(layers, (4, alpha)))
        randomize_adapters(lm)
        return generated()

    adapt(64)
    found = adapt(4)
    lm.generate_function = None  # all is compiled anew
    np.testing.assert_array_equal(found[0]["token_ids"], generated()[0]["token_ids"])
    np.testing.assert_array_equal(found[0]["logprobs"], generated()[0]["logprobs"])


def test_a_file_that_cannot_be_written_is_as_it_was(lm, tmp_path):
    adapted(lm).backbone.save_lora_weights(tmp_path / "a.lora.h5")
    before = (tmp_path / "a.lora.h5").read_bytes()
    lm.stack_blocks()
    with pytest.raises(ValueError, match="stack"):
        lm.backbone.save_lora_weights(tmp_path / "a.lora.h5")
    assert (tmp_path / "a.lora.h5").read_bytes() == before


def test_a_damaged_file_is_named(lm, tmp_path):
    (tmp_path / "a.lora.h5").write_bytes(b"no hdf5")
    with pytest.raises(ValueError, match="a.lora.h5 is no whole file of `save_lora_weights`"):
        lm.backbone.load_lora_weights(tmp_path / "a.lora.h5")
