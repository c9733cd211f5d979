"""Every mode of Keras' quantization: what it touches, that it is saved whole, and trained on."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_mamba2
from keras_mamba2.state.files import fingerprint

CALIBRATED = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("gptq", "awq")]
MODES = ["int8", "int4", "float8", *CALIBRATED]
WEIGHT_DTYPES = {"int8": "int8", "int4": "int8", "float8": "float32", "gptq": "uint8"}
WEIGHT_DTYPES["awq"] = "uint8"
# Of the logits' root mean square, measured, times two. Four bits are few for a model so small.
ERRORS = {"int8": 0.05, "int4": 0.7, "float8": 0.25, "gptq": 0.7, "awq": 0.7}
TEXTS = ["to be, or not to be, that is the question", "all the world is a stage, and all the men"]
INPUTS = {"token_ids": np.arange(40, 54)[None], "padding_mask": np.ones((1, 14), "int32")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
    """Smaller than others, since GPTQ goes through it column by column."""
    keras.utils.set_random_seed(0)
    lm = keras_mamba2.Mamba2CausalLM(
        keras_mamba2.Mamba2Backbone(
            257, 2, 8, state_dim=4, head_dim=4, num_groups=2, use_bias=True, chunk_size=8
        ),
        keras_mamba2.Mamba2CausalLMPreprocessor(byte_tokenizer, sequence_length=32),
    )
    folder = tmp_path_factory.mktemp("quantize") / "float"
    lm.save_to_preset(folder)
    return folder


def config_of(mode, tokenizer, texts=TEXTS, **changes):
    if mode not in ("gptq", "awq"):
        return None
    cls = {"gptq": keras.quantizers.GPTQConfig, "awq": keras.quantizers.AWQConfig}[mode]
    arguments = {"num_samples": 4, "sequence_length": 16, "group_size": 4, **changes}
    return cls(dataset=texts, tokenizer=tokenizer, **arguments)


def quantized(folder, mode, dtype="float32", filters=None, **kwargs):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder, dtype=dtype)
    config = config_of(mode, lm.preprocessor.tokenizer, **kwargs)
    lm.quantize(mode, config=config, filters=filters)
    return lm


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def lm(folder, mode, byte_tokenizer):
    """Quantized when there were programs for it already."""
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder, preprocessor=None)
    lm.compile(sampler="greedy")
    before = lm.make_generate_function()
    lm.quantize(mode, config=config_of(mode, byte_tokenizer))
    assert lm.make_generate_function() is not before
    return lm


def logits_of(lm):
    return ops.convert_to_numpy(lm(INPUTS))


def values_of(lm):
    return {v.path: np.array(ops.convert_to_numpy(v.value)) for v in lm.backbone.weights}


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def test_projections_and_embedding_are_quantized_and_nothing_else(lm, mode):
    for block in lm.backbone.blocks:
        for layer in (block.mixer.in_proj, block.mixer.out_proj):
            assert layer.quantization_mode == mode
            kernel = next(v for v in layer.weights if v.name == "kernel")
            assert kernel.dtype == WEIGHT_DTYPES[mode]
        for name in ("A_log", "dt_bias", "D"):
            assert getattr(block.mixer, name).dtype == "float32"
    embedding = lm.backbone.token_embedding
    assert embedding.quantization_mode == (mode if mode in ("int8", "int4") else None)


def test_outputs_stay_near(lm, mode, folder):
    expected = logits_of(keras_mamba2.Mamba2CausalLM.from_preset(folder))
    error = rms(logits_of(lm) - expected) / rms(expected)
    assert 0 < error < ERRORS[mode]


def test_it_generates(lm):
    ids = lm.generate(INPUTS | {"padding_mask": np.arange(14)[None] < 6}, stop_token_ids=None)
    ids = ids["token_ids"]
    assert (ids[:, :6] == INPUTS["token_ids"][:, :6]).all()
    logits = ops.convert_to_numpy(lm({**INPUTS, "token_ids": ids}))[:, 5:-1]
    taken = np.take_along_axis(logits, ids[:, 6:, None], axis=-1)[..., 0]
    # In int8 activations are rounded too, where steps and blocks differ by a hair's breadth.
    assert (logits.max(axis=-1) - taken).max() <= 0.05 * rms(logits)


def test_a_loaded_model_is_the_same(lm, tmp_path):
    lm.save_to_preset(tmp_path / "preset")
    lm.save(tmp_path / "model.keras")
    expected, print_ = logits_of(lm), fingerprint(lm.backbone)
    for again in (
        keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "preset", preprocessor=None),
        keras.models.load_model(tmp_path / "model.keras"),
    ):
        assert np.array_equal(logits_of(again), expected)
        assert fingerprint(again.backbone) == print_
        assert again.backbone.get_config() == lm.backbone.get_config()


def test_the_file_of_a_state_belongs_to_quantized_weights(lm, folder, tmp_path):
    state = lm.prefill(INPUTS)
    state.save(tmp_path / "state", lm.backbone)
    assert keras_mamba2.Mamba2State.load(tmp_path / "state", lm.backbone).batch_size == 1
    plain = keras_mamba2.Mamba2CausalLM.from_preset(folder)
    with pytest.raises(ValueError, match="state of another model.*has other weights"):
        keras_mamba2.Mamba2State.load(tmp_path / "state", plain.backbone)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "dtype"), [("int4", "bfloat16"), ("gptq", "mixed_bfloat16")])
def test_a_loaded_model_keeps_its_dtype(folder, tmp_path, mode, dtype):
    lm = quantized(folder, mode, dtype)
    lm.save_to_preset(tmp_path / "new")
    again = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "new")
    assert [v.dtype for v in again.backbone.weights] == [v.dtype for v in lm.backbone.weights]
    assert again.backbone.compute_dtype == lm.backbone.compute_dtype == "bfloat16"
    if mode == "gptq":  # which computes while it quantizes, with an index that bfloat16 rounds
        expected = logits_of(keras_mamba2.Mamba2CausalLM.from_preset(folder))
        error = rms(logits_of(again).astype("float32") - expected) / rms(expected)
        assert error < ERRORS[mode]


@pytest.mark.parametrize("mode", ["gptq", "awq"])
@pytest.mark.slow
def test_the_calibration_data_count(folder, mode):
    """Weights that do not depend on them are rounded to nearest, whatever the mode is called."""
    one, other = (values_of(quantized(folder, mode, texts=[text])) for text in ("aaaa", "zyxw"))
    assert any(not np.array_equal(one[path], other[path]) for path in one)


def adapt(lm):
    lm.backbone.enable_lora(2)
    rng = np.random.default_rng(0)
    for variable in lm.trainable_variables:
        variable.assign(0.1 * rng.normal(size=variable.shape))


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.slow
def test_adapters_learn_on_quantized_weights(folder, mode, tmp_path):
    lm = quantized(folder, mode)
    lm.backbone.enable_lora(4)
    before = values_of(lm)
    lm.compile(optimizer=keras.optimizers.AdamW(0.1))
    losses = lm.fit(TEXTS * 4, batch_size=8, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.05
    for path, value in values_of(lm).items():
        assert (value.tobytes() == before[path].tobytes()) == ("lora_kernel" not in path), path
    lm.backbone.save_lora_weights(tmp_path / "new.lora.h5")
    again = quantized(folder, mode)
    again.backbone.load_lora_weights(tmp_path / "new.lora.h5")
    assert np.array_equal(logits_of(again), logits_of(lm))


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.slow
def test_merging_quantizes_anew(folder, mode):
    lm = quantized(folder, mode)
    adapt(lm)
    expected = logits_of(lm)
    paths = {v.path for v in lm.backbone.weights if "lora" not in v.path}
    lm.backbone.merge_lora()
    assert {v.path for v in lm.backbone.weights} == paths
    assert 0 < rms(logits_of(lm) - expected) / rms(expected) < ERRORS[mode]


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.slow
def test_adapters_first_is_the_same(folder, mode):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder)
    adapt(lm)
    lm.quantize(mode)
    other = quantized(folder, mode)
    adapt(other)
    assert np.array_equal(logits_of(lm), logits_of(other))


@pytest.mark.parametrize("mode", ["float8", "gptq", "awq"])
def test_adapters_first_is_refused_where_keras_does_not_combine(folder, mode):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder)
    lm.backbone.enable_lora(2)
    before = values_of(lm)
    config = config_of(mode, lm.preprocessor.tokenizer)
    with pytest.raises(ValueError, match=f"LoRA adapter.*mode='{mode}'. Call `backbone.merge_lora"):
        lm.quantize(mode, config=config)
    assert list(values_of(lm)) == list(before)
    assert not any(layer.quantization_mode for layer in lm.backbone._flatten_layers())


def test_adapters_after_are_refused_where_keras_does_not_train_them(lm, mode):
    if mode in ("int8", "int4"):
        return  # trained above
    count = len(lm.trainable_variables)
    with pytest.raises(ValueError, match=f"LoRA needs weights in .*mode='{mode}'"):
        lm.backbone.enable_lora(2)
    assert len(lm.trainable_variables) == count


def test_it_is_quantized_once(lm):
    with pytest.raises(ValueError, match="already quantized"):
        lm.quantize("int8")


def test_a_quantized_model_is_not_exported(lm, tmp_path):
    with pytest.raises(ValueError, match="export a model before it is quantized"):
        lm.export_to_transformers(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_filters_choose_layers(folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder)
    lm.quantize("int8", filters="in_proj")
    quantized = {layer.name for layer in lm.backbone._flatten_layers() if layer.quantization_mode}
    assert quantized == {"in_proj"}


@pytest.mark.slow
def test_float8_training(folder):
    lm = quantized(folder, "float8")
    lm.compile(optimizer=keras.optimizers.AdamW(1e-2))
    losses = lm.fit(TEXTS * 4, batch_size=8, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    history = lm.backbone.blocks[0].mixer.in_proj.inputs_amax_history
    assert np.any(ops.convert_to_numpy(history.value))


@pytest.mark.parametrize(
    ("mode", "dtype", "changes", "message"),
    [
        ("gptq", "float32", {"texts": None}, "GPTQConfig needs a `dataset` and a `tokenizer`"),
        ("awq", "float32", {"texts": None}, "AWQConfig needs a `dataset` and a `tokenizer`"),
        ("gptq", "bfloat16", {}, "only what is stored in float32.*Received: dtype='bfloat16'"),
        ("gptq", "float32", {"group_size": 24}, "must divide 128.*up to 160. .*group_size=24"),
        ("gptq", "float32", {"group_size": -1}, "must divide 128.*Received: group_size=-1"),
    ],
)
def test_what_keras_finds_too_late_is_found_before(mode, dtype, changes, message):
    backbone = keras_mamba2.Mamba2Backbone(16, 1, 80, state_dim=4, head_dim=8, dtype=dtype)
    lm = keras_mamba2.Mamba2CausalLM(backbone)
    with pytest.raises(ValueError, match=message):
        lm.quantize(mode, config=config_of(mode, object(), **changes))
    assert not any(layer.quantization_mode for layer in backbone._flatten_layers())


def test_a_dtype_that_quantizes_is_refused(small_backbone_arguments):
    with pytest.raises(ValueError, match=r"then call `quantize\('int8'\)`. Received: int8_from_fl"):
        keras_mamba2.Mamba2Backbone(**small_backbone_arguments, dtype="int8_from_float32")


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_backbone_that_was_loaded_is_saved_again(mode, preset_folder, tmp_path):
    backbone = keras_mamba2.Mamba2Backbone.from_preset(preset_folder)
    backbone.quantize(mode)
    backbone.save_to_preset(tmp_path / "first")
    loaded = keras_mamba2.Mamba2Backbone.from_preset(tmp_path / "first")
    loaded.save_to_preset(tmp_path / "second")
    again = keras_mamba2.Mamba2Backbone.from_preset(tmp_path / "second")
    expected = {w.path: w.numpy() for w in backbone.weights}
    for other in (loaded, again):
        actual = {w.path: w.numpy() for w in other.weights}
        assert set(actual) == set(expected)
        assert all(np.array_equal(actual[path], expected[path]) for path in expected)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_adapters_of_a_loaded_model_are_those_of_the_model(folder, mode, tmp_path):
    lm = quantized(folder, mode)
    lm.save_to_preset(tmp_path / "preset")
    loaded = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "preset")
    adapt(lm)
    adapt(loaded)
    assert np.array_equal(logits_of(loaded), logits_of(lm))
    loaded.save_to_preset(tmp_path / "merged")
    loaded.save(tmp_path / "merged.keras")
    loaded.save_weights(tmp_path / "merged.weights.h5")
    for model in (lm, loaded):
        model.backbone.merge_lora()
    expected = logits_of(lm)
    assert np.array_equal(logits_of(loaded), expected)
    again = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "merged")
    assert np.array_equal(logits_of(again), expected)
    assert np.array_equal(logits_of(keras.models.load_model(tmp_path / "merged.keras")), expected)
    adapt(loaded)
    loaded.load_weights(tmp_path / "merged.weights.h5")
    assert np.array_equal(logits_of(loaded), expected)


def test_modes_may_be_mixed_step_by_step(folder, tmp_path):
    """Also where layers share their policies, as in a model that was loaded in between."""
    lm = quantized(folder, "int8", filters="in_proj")
    lm.save_to_preset(tmp_path / "first")
    loaded = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "first")
    for model, name in ((lm, "second"), (loaded, "third")):
        model.quantize("int4", filters="out_proj")
        model.quantize("int8", filters="token_embedding")
        model.save_to_preset(tmp_path / name)
        again = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / name)
        assert np.array_equal(logits_of(again), logits_of(lm))
        mixer = again.backbone.blocks[1].mixer
        modes = [layer.quantization_mode for layer in (mixer.in_proj, mixer.out_proj)]
        assert modes == ["int8", "int4"]


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_policies_of_a_user_are_quantized(mode, small_backbone_arguments, tmp_path):
    policies = {".*/out_proj": keras.DTypePolicy("mixed_bfloat16")}
    policies = keras.dtype_policies.DTypePolicyMap("float32", policies)
    lm = keras_mamba2.Mamba2CausalLM(
        keras_mamba2.Mamba2Backbone(**small_backbone_arguments, dtype=policies)
    )
    lm.quantize(mode)
    for block in lm.backbone.blocks:
        assert block.mixer.in_proj.compute_dtype == "float32"
        assert block.mixer.out_proj.compute_dtype == "bfloat16"
    lm.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(logits_of(again), logits_of(lm))


def test_models_with_the_same_policies_are_quantized_apart(small_backbone_arguments):
    policies = keras.dtype_policies.DTypePolicyMap("float32")
    one, other = (
        keras_mamba2.Mamba2Backbone(**small_backbone_arguments, dtype=policies) for _ in range(2)
    )
    one.quantize("int8")
    assert not policies
    assert not any(layer.quantization_mode for layer in other._flatten_layers())


def test_what_cannot_be_quantized_is_found_before(folder):
    lm = quantized(folder, "int8", filters="in_proj")
    before = values_of(lm)
    with pytest.raises(ValueError, match="in_proj' is already quantized with mode='int8'"):
        lm.quantize("int4")
    assert list(values_of(lm)) == list(before)
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder)
    lm.backbone.enable_lora(2, ["out_proj"])
    before = values_of(lm)
    with pytest.raises(ValueError, match="out_proj' has a LoRA adapter"):
        lm.quantize("float8")
    assert list(values_of(lm)) == list(before)
    with pytest.raises(ValueError, match="`filters` must be a regular .* Received: filters=3"):
        lm.quantize("int8", filters=3)


def saved_again(model, folder):
    """The model of a file, and that of a preset."""
    model.save(folder / "model.keras")
    model.save_to_preset(folder / "preset")
    return keras.models.load_model(folder / "model.keras"), type(model).from_preset(
        folder / "preset"
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_classifier_is_saved_with_its_head_in_floating_point(folder, mode, tmp_path):
    load = keras_mamba2.Mamba2TextClassifier.from_preset
    classifier = load(folder, num_classes=3, hidden_dim=4)
    config = config_of(mode, classifier.preprocessor.tokenizer)
    classifier.quantize(mode, config=config, filters=".*")
    lm = quantized(folder, mode)
    assert fingerprint(classifier.backbone) == fingerprint(lm.backbone)
    assert classifier.output_dense.quantization_mode is None
    expected = ops.convert_to_numpy(classifier(INPUTS))
    for again in saved_again(classifier, tmp_path):
        assert np.array_equal(ops.convert_to_numpy(again(INPUTS)), expected)
        assert fingerprint(again.backbone) == fingerprint(classifier.backbone)


@pytest.mark.parametrize(
    ("mode", "dtype"), [("int8", "mixed_bfloat16"), ("int4", "float32"), ("float8", "float32")]
)
def test_a_forecaster_is_saved(mode, dtype, tmp_path):
    sizes = {"hidden_dim": 16, "state_dim": 4, "head_dim": 8, "chunk_size": 4}
    forecaster = keras_mamba2.Mamba2Forecaster(3, 2, num_layers=1, dtype=dtype, **sizes)
    x = np.random.default_rng(0).normal(size=(2, 8, 2)).astype("float32")
    before = ops.convert_to_numpy(forecaster(x))
    forecaster.quantize(mode)
    expected = ops.convert_to_numpy(forecaster(x))
    assert 0 < rms(expected - before) / rms(before) < ERRORS[mode]
    assert forecaster.head.quantization_mode is None
    for again in saved_again(forecaster, tmp_path):
        assert np.array_equal(ops.convert_to_numpy(again(x)), expected)
        assert again.get_config() == forecaster.get_config()
    with pytest.raises(ValueError, match="keep their dtypes. Leave out `dtype`.*'bfloat16'"):
        keras_mamba2.Mamba2Forecaster.from_preset(tmp_path / "preset", dtype="bfloat16")


def test_a_forecaster_has_no_texts_to_calibrate_with(byte_tokenizer):
    forecaster = keras_mamba2.Mamba2Forecaster(3, hidden_dim=16, state_dim=4, head_dim=8)
    count = len(forecaster.weights)
    with pytest.raises(ValueError, match="does not read. Quantize it .*mode='gptq'"):
        forecaster.quantize(config=config_of("gptq", byte_tokenizer))
    assert len(forecaster.weights) == count


def test_what_was_not_calibrated_is_not_saved(folder, tmp_path):
    """Its kernels would be zeros."""

    class Broken:
        def tokenize(self, text):
            raise RuntimeError("no tokens")

    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder, preprocessor=None)
    with pytest.raises(RuntimeError, match="no tokens"):
        lm.quantize("gptq", config=config_of("gptq", Broken()))
    with pytest.raises(ValueError, match="has no quantized weights yet.*Load the model anew"):
        lm.save_to_preset(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_float8_of_shared_blocks_is_refused():
    """Keras would add the scales of all places."""
    transformer = {
        "kind": "shared_transformer",
        "attention": {"num_query_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
        "mlp": {"intermediate_dim": 16},
    }
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=16,
        hidden_dim=8,
        blocks=["mamba2", "shared>mamba2", "shared>mamba2"],
        sublayers={"mamba2": {"head_dim": 4}, "shared": transformer},
    )
    lm = keras_mamba2.Mamba2CausalLM(backbone, preprocessor=None)
    with pytest.raises(ValueError, match="float8 layer by layer"):
        lm.quantize("float8")
    assert not any(layer.quantization_mode for layer in backbone.blocks[0].projections)


@pytest.mark.parametrize("pattern", [".*/in_proj", ".*/mixer", ".*/out_proj"])
def test_a_mixer_may_have_policies_of_its_own(folder, pattern):
    policies = keras.dtype_policies.DTypePolicyMap(
        "float32", {pattern: keras.DTypePolicy("bfloat16")}
    )
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder, dtype=policies, preprocessor=None)
    lm.compile(sampler="greedy")
    text = lm.generate(INPUTS, max_new_tokens=6, stop_token_ids=None)
    assert text["token_ids"].shape == (1, 20)


def test_the_loss_is_scaled_in_float16_also_with_several_policies(folder, tmp_path):
    quantized(folder, "int4", "mixed_float16").save_to_preset(tmp_path / "int4")
    lm = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "int4")
    lm.backbone.enable_lora(2)
    lm.compile(optimizer="adam")
    assert isinstance(lm.optimizer, keras.optimizers.LossScaleOptimizer)
    lm.fit(TEXTS, batch_size=2, verbose=0)
    lm.compile(optimizer="adam", auto_scale_loss=False)
    assert not isinstance(lm.optimizer, keras.optimizers.LossScaleOptimizer)
    policies = keras.dtype_policies.DTypePolicyMap("mixed_float16")
    forecaster = keras_mamba2.Mamba2Forecaster(
        2, num_layers=1, hidden_dim=8, head_dim=4, dtype=policies
    )
    forecaster.compile(optimizer="adam", loss="mae")
    assert isinstance(forecaster.optimizer, keras.optimizers.LossScaleOptimizer)
