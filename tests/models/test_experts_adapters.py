"""LoRA on the matrices of experts: each expert has its own adapter, whichever way products go."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_mamba2
from keras_mamba2.layers import MixtureOfExperts
from keras_mamba2.layers.experts_projection import ExpertsProjection
from keras_mamba2.models import lora
from keras_mamba2.ops import experts as experts_ops
from tests import reference

EPS = np.finfo(np.float32).eps
D = 12
EXPERTS = {"intermediate_dim": 7, "num_experts": 6, "num_experts_per_token": 2}
CASES = {
    "gated": EXPERTS,
    "latent": {**EXPERTS, "latent_dim": 5, "scoring": "sigmoid", "gated": False},
}
MODES = [None, *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("int8", "int4"))]
# One token, few, and many; and many on a backend without products by groups of rows.
WAYS = {"sliced": 1, "gathered": 3, "sorted": 20, "plain": 20}
INPUTS = {"token_ids": np.arange(20)[None], "padding_mask": np.ones((1, 20), "int32")}


def randomize_adapters(layers, seed=0):
    rng = np.random.default_rng(seed)
    for layer in layers:
        for factor in (layer.lora_kernel_a, layer.lora_kernel_b):
            factor.assign(0.3 * rng.normal(size=factor.shape))


def matrices(layer):
    return [part for part in layer.projections if isinstance(part, ExpertsProjection)]


def layer_of(name, mode, rank=2, dtype="float32"):
    layer = MixtureOfExperts(D, **CASES[name], dtype=dtype)
    layer.build((None, None, D))
    reference.randomize(layer)
    for part in matrices(layer):
        if mode is not None:
            part.quantize(mode)
        part.enable_lora(rank, lora_alpha=3)
    return layer


def input_of(t):
    return np.random.default_rng(1).normal(size=(1, t, D)).astype("float32")


def merged_by_hand(layer):
    """The weights in float64, with what the adapters add."""
    weights = {k: v for k, v in reference.weights_of(layer).items() if "lora_" not in k}
    for part in matrices(layer):
        kernel = kernel_of(part)
        a, b = (np.asarray(f, np.float64) for f in (part.lora_kernel_a, part.lora_kernel_b))
        for expert in range(len(kernel)):
            kernel[expert] += part.lora_alpha / part.lora_rank * a[expert] @ b[expert]
        weights[f"{part.name}/kernel"] = kernel
    return weights


def kernel_of(part):
    kernel = np.array(ops.convert_to_numpy(part.kernel))
    if part.quantization_mode is None:
        return kernel.astype("float64")
    scale = np.asarray(part.kernel_scale, np.float64)
    if part.quantization_mode == "int8":
        return kernel * scale
    nibbles = np.stack([kernel & 15, kernel >> 4 & 15], axis=-1)
    numbers = nibbles.reshape(*kernel.shape[:-1], -1)[..., : part.units].astype("float64")
    numbers = np.where(numbers > 7, numbers - 16, numbers)
    return (numbers - np.asarray(part.kernel_zero, np.float64)) * scale


@pytest.fixture(params=WAYS)
def tokens(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(experts_ops, "_sorted", experts_ops._all_experts)
    return WAYS[request.param]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_sum(name, mode, tokens):
    layer, x = layer_of(name, mode), input_of(tokens)
    before = np.asarray(layer(x))
    randomize_adapters(matrices(layer))
    truth = reference.mixture_of_experts(x, merged_by_hand(layer), layer.get_config())
    found = np.asarray(layer(x), np.float64)
    assert np.abs(found - truth).max() <= 64 * EPS * np.abs(truth).max()
    assert np.abs(found - before).max() > 0.1 * np.abs(truth).max()


@pytest.mark.parametrize("mode", MODES)
def test_a_new_adapter_changes_nothing(mode, tokens):
    layer, x = layer_of("gated", mode), input_of(tokens)
    found = np.asarray(layer(x))
    for part in matrices(layer):
        assert np.asarray(part.lora_kernel_a).any(axis=(1, 2)).all()
        part.lora_enabled = False
    np.testing.assert_array_equal(found, np.asarray(layer(x)))


def model(dtype="float32"):
    keras.utils.set_random_seed(0)
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=64,
        hidden_dim=16,
        blocks=["mamba2", "gated", "latent", "gated+mlp"],
        sublayers={
            "mamba2": {"state_dim": 4, "head_dim": 8},
            "gated": {**CASES["gated"], "kind": "mixture_of_experts"},
            "latent": {**CASES["latent"], "kind": "mixture_of_experts"},
            "mlp": {"intermediate_dim": 8},
        },
        dtype=dtype,
    )
    reference.randomize(backbone)
    return keras_mamba2.Mamba2CausalLM(backbone)


def adapted(mode=None, dtype="float32", names=None):
    lm = model(dtype)
    if mode is not None:
        lm.quantize(mode)
    lm.backbone.enable_lora(4, names)
    randomize_adapters(lora.adapted_projections(lm.backbone))
    return lm


def logits_of(lm):
    return np.asarray(ops.cast(lm(INPUTS), "float32"))


def values_of(lm):
    return {v.path: np.array(ops.convert_to_numpy(v.value)) for v in lm.backbone.weights}


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


@pytest.mark.parametrize("mode", MODES)
def test_only_adapters_learn(mode):
    """Of the experts that tokens took: of the others no gradient is other than zero."""
    lm = model()
    if mode is not None:
        lm.quantize(mode)
    lm.backbone.enable_lora(4)
    layers = [x for x in lora.adapted_projections(lm.backbone) if "experts" in x.name]
    assert len(layers) == 3 + 2 + 3
    before = values_of(lm)
    lm.compile(optimizer=keras.optimizers.SGD(1.0), weighted_metrics=[])
    few = {name: value[:, :2] for name, value in INPUTS.items()}
    lm.fit(few, np.array([[3, 5]]), epochs=2, verbose=0)
    after = values_of(lm)
    for path, value in after.items():
        assert (value.tobytes() == before[path].tobytes()) or "lora_kernel" in path, path
    for layer in layers:
        learnt = after[layer.lora_kernel_b.path].any(axis=(1, 2))
        assert learnt.any()
    # Two tokens take four of six experts at most.
    first = after[layers[0].lora_kernel_b.path].any(axis=(1, 2))
    assert not first.all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_changes_rounding_alone(dtype):
    lm = adapted(dtype=dtype)
    paths = {path for path in values_of(lm) if "lora" not in path}
    before = logits_of(lm)
    lm.backbone.merge_lora()
    assert set(values_of(lm)) == paths
    error = rms(logits_of(lm) - before) / rms(before)
    assert error < (2e-6 if dtype == "float32" else 0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "most"), [("int8", 0.05), ("int4", 0.7)])
def test_merging_quantizes_anew(mode, most):
    lm = adapted(mode)
    before = logits_of(lm)
    lm.backbone.merge_lora()
    assert {layer.quantization_mode for layer in lora.projections(lm.backbone)} == {mode}
    assert 0 < rms(logits_of(lm) - before) / rms(before) < most


@pytest.mark.parametrize("mode", MODES)
def test_adapters_are_saved_and_loaded(mode, tmp_path):
    lm = adapted(mode, names=["experts_up", "experts_down"])
    lm.backbone.save_lora_weights(tmp_path / "new.lora.h5")
    again = model()
    if mode is not None:
        again.quantize(mode)
    again.backbone.load_lora_weights(tmp_path / "new.lora.h5")
    np.testing.assert_array_equal(logits_of(again), logits_of(lm))


def test_adapters_of_other_experts_are_refused(tmp_path):
    adapted().backbone.save_lora_weights(tmp_path / "new.lora.h5")
    config = model().backbone.get_config()
    config["sublayers"]["gated"]["num_experts"] = 5
    other = keras_mamba2.Mamba2HybridBackbone.from_config(config)
    with pytest.raises(ValueError, match="holds the adapters of another model"):
        other.load_lora_weights(tmp_path / "new.lora.h5")
    assert not lora.adapted_projections(other)


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_model_has_its_adapters_merged(mode, tmp_path):
    lm = adapted(mode)
    lm.save_to_preset(tmp_path / "preset")
    again = keras_mamba2.Mamba2CausalLM.from_preset(str(tmp_path / "preset"), preprocessor=None)
    lm.backbone.merge_lora()
    ours, theirs = values_of(lm), values_of(again)
    assert set(ours) == set(theirs)
    for path, value in ours.items():
        np.testing.assert_allclose(theirs[path], value, rtol=1e-6, atol=1e-6, err_msg=path)


def test_an_adapter_learns_on_after_weights_are_loaded(tmp_path):
    lm = adapted()
    lm.save_weights(tmp_path / "new.weights.h5")
    expected = logits_of(lm)
    lm.load_weights(tmp_path / "new.weights.h5")
    np.testing.assert_allclose(logits_of(lm), expected, atol=64 * EPS * np.abs(expected).max())
    for layer in lora.adapted_projections(lm.backbone):
        assert np.asarray(layer.lora_kernel_a).any()
        assert not np.asarray(layer.lora_kernel_b).any()
