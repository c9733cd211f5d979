"""Every family of hybrids: loaded from transformers, as near to float64 as it, and back again."""

import functools
import inspect
import json
import shutil

import jax
import keras
import numpy as np
import pytest
import torch
import transformers

import keras_mamba2
from keras_mamba2 import conversion
from keras_mamba2._compat.keras_layers import flatten_layers
from keras_mamba2.conversion import describe
from keras_mamba2.conversion.architectures.sublayers import ELSEWHERE
from keras_mamba2.layers import MixtureOfExperts
from tests import reference
from tests.conversion import hybrids
from tests.conversion.checkpoints import assert_same_weights
from tests.hub_server import Hub
from tests.hub_server import point_client_to
from tests.hub_server import serving

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
    # Two programs, and roundings of their own.
    np.testing.assert_allclose(jax.jit(lm.score)(ids), expected, rtol=0, atol=4e-6)


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


@pytest.mark.parametrize("name", [*hybrids.FAMILIES, "nemotron", *hybrids.ALONE])
def test_export_and_back(name, lm_of, folder_of, tmp_path):
    """There and back with identical weights, and the same logits in transformers."""
    lm = lm_of(name)
    lm.export_to_transformers(tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["model_type"] == hybrids.random_model(name).config.model_type
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


# For every argument of every layer a value that no family has as a default.
OPTIONS = {
    "mamba2": {
        "state_dim": 4,
        "head_dim": 4,
        "num_groups": 2,
        "expansion": 4,
        "conv_kernel_size": 3,
        "chunk_size": 4,
        "use_bias": True,
        "use_conv_bias": False,
        "use_output_bias": True,
        "gated_norm": "before_gate",
        "projection_multipliers": [0.5, 2.0, 0.7, 1.5, 1.2],
        "layer_norm_epsilon": 0.1,
        "time_step_limit": (0.2, None),
        "time_step_min": 0.01,
        "time_step_max": 0.2,
        "time_step_floor": 1e-3,
        "a_initializer_range": (2, 3),
        "num_residual_layers": 4,
        "state_dtype": "bfloat16",
    },
    "attention": {
        "num_query_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "rotary_dim": 2,
        "rope_max_wavelength": 20.0,
        "scale": 0.7,
        "key_multiplier": 3.0,
        "use_bias": True,
        "input_dim": 32,
        "conv_kernel_size": 2,
        "adapter_rank": 2,
        "key_value_dtype": "int8",
    },
    "mlp": {
        "intermediate_dim": 12,
        "activation": "gelu",
        "gated": False,
        "gate_multiplier": 2.0,
        "use_bias": True,
        "adapter_rank": 2,
    },
    "mixture_of_experts": {
        "intermediate_dim": 12,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "activation": "gelu",
        "gated": True,
        "scoring": "sigmoid",
        "num_expert_groups": 2,
        "num_groups_per_token": 2,
        "normalize_weights": False,
        "weights_multiplier": 0.5,
        "latent_dim": 8,
        "use_bias": True,
        "load_balancing_loss": 0.1,
    },
    "shared_transformer": {"layer_norm_epsilon": 0.1},
}
# For models that have those.
OTHERWISE = {"num_groups": 1, "use_bias": False, "gated": True, "scoring": "softmax"}
MULTIPLIERS = {"input_multiplier": 0.5, "output_multiplier": 2.0}
KINDS = keras_mamba2.Mamba2HybridBackbone.kinds


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_tried(kind):
    elsewhere = {"self", "hidden_dim", "shared", "kwargs"}
    elsewhere |= {"attention", "mlp"} if kind == "shared_transformer" else set()
    assert set(inspect.signature(KINDS[kind].__init__).parameters) - elsewhere == {*OPTIONS[kind]}


def arguments_of(name):
    family, arguments = hybrids.CASES[name]
    config = getattr(transformers, f"{family}Config")(**arguments).to_dict()
    # Which transformers 5 takes for a limit: see below.
    limit = (config.get("time_step_min", 0.0), None)
    return conversion.constructor_arguments({**config, "time_step_limit": limit})


def changed_models(name):
    """Each model with one option changed: the option, and the model's configuration."""
    config = keras_mamba2.Mamba2HybridBackbone(**arguments_of(name)).get_config()
    for sublayer, arguments in config["sublayers"].items():
        kind = arguments.get("kind", sublayer)
        multipliers = {} if kind == "shared_transformer" else MULTIPLIERS
        for option, value in {**OPTIONS[kind], **multipliers}.items():
            value = OTHERWISE[option] if value == arguments.get(option) else value
            changed = {**config["sublayers"], sublayer: {**arguments, option: value}}
            yield f"{sublayer}.{option}", {**config, "sublayers": changed}
    tied = config["tie_word_embeddings"]
    yield "tie_word_embeddings", {**config, "tie_word_embeddings": not tied}


def exported(config):
    """The `config.json`, or why there is none."""
    try:
        return conversion.transformers_config(config)
    except ValueError as error:
        return str(error)


def layers_of(arguments):
    """What layers make of their arguments. Those that only matter elsewhere are left out."""
    epsilon = {"layer_norm_epsilon": arguments["layer_norm_epsilon"]}
    for name, given in arguments["sublayers"].items():
        kind = given.get("kind", name)
        given = epsilon | given if kind in ("mamba2", "shared_transformer") else dict(given)
        given.pop("kind", None)
        multipliers = {key: given.pop(key, 1.0) for key in MULTIPLIERS}
        layer = KINDS[kind](arguments["hidden_dim"], **given, name=name)
        config = {**layer.get_config(), **multipliers}
        if kind == "attention":
            config["scale"] = config["scale"] or config["head_dim"] ** -0.5
        if kind == "mamba2":
            config["projection_multipliers"] = config["projection_multipliers"] or (1.0,) * 5
        yield {key: value for key, value in config.items() if key not in ELSEWHERE}


@families
def test_no_option_is_lost_in_silence(name):
    """Export refuses it and says what is missing, or it is read again."""
    for option, config in changed_models(name):
        written = exported(config)
        if isinstance(written, str):
            assert " lacks " in written, option
        else:
            again = conversion.constructor_arguments(json.loads(json.dumps(written)))
            assert list(layers_of(again)) == list(layers_of(config)), option


@pytest.mark.slow
@families
def test_transformers_reads_every_option_that_is_exported(name, tmp_path):
    ids = random_ids(t=9)
    for option, config in changed_models(name):
        if isinstance(exported(config), str):
            continue
        backbone = keras_mamba2.Mamba2HybridBackbone.from_config(config)
        reference.randomize(backbone)
        conversion.export_to_transformers(backbone, None, tmp_path / option)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / option).eval()
        expected = backbone.logits(backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            hybrids.logits(model, ids), expected, rtol=0, atol=1e-4 * scale, err_msg=option
        )


SMALL = {
    "vocabulary_size": 16,
    "hidden_dim": 16,
    "blocks": ["mamba2", "mlp", "attention", "mlp"],
    "sublayers": {
        "mamba2": {"head_dim": 8},
        "attention": {"num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        "mlp": {"intermediate_dim": 24},
        "not used": {"kind": "mlp", "intermediate_dim": 8},
    },
}


def config_of(**changes):
    backbone = keras_mamba2.Mamba2HybridBackbone(**{**SMALL, **changes})
    return conversion.transformers_config(backbone.get_config())


def test_what_sublayers_leave_out_is_written():
    config = config_of()
    assert config["mamba_d_state"] == 128
    assert config["attention_multiplier"] == 8**-0.5


@pytest.mark.parametrize(("rotary_dim", "family"), [(4, "bamba"), (8, "granitemoehybrid")])
def test_what_is_rotated_tells_the_family(rotary_dim, family):
    attention = {**SMALL["sublayers"]["attention"], "rotary_dim": rotary_dim}
    config = config_of(sublayers={**SMALL["sublayers"], "attention": attention})
    assert config["model_type"] == family


def test_another_share_that_is_rotated_is_refused():
    """transformers always rotates half of Bamba's heads, and Granite's whole."""
    attention = {**SMALL["sublayers"]["attention"], "rotary_dim": 2}
    with pytest.raises(ValueError, match="Bamba lacks attention.rotary_dim=2. Received"):
        config_of(sublayers={**SMALL["sublayers"], "attention": attention})


def test_names_that_are_no_kinds_are_refused():
    sublayers = {**SMALL["sublayers"], "mlp": SMALL["sublayers"]["attention"]}
    sublayers["mlp"] = {"kind": "attention", **sublayers["mlp"]}
    with pytest.raises(ValueError, match="transformers has no model of such blocks"):
        config_of(sublayers=sublayers)


@pytest.mark.parametrize("name", ["bamba, no attention", "bamba, no mixer", "nemotron, no mixer"])
def test_an_adapter_of_a_model_with_one_kind_of_layer(name, folder_of, tmp_path):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder_of(name), preprocessor=None)
    lm.backbone.enable_lora(2)
    lm.save_peft_adapter(tmp_path / "adapter")
    again = keras_mamba2.Mamba2CausalLM.from_preset(folder_of(name), preprocessor=None)
    again.load_peft_adapter(tmp_path / "adapter")
    assert_same_weights(lm.backbone, again.backbone)


@families
def test_a_preset_and_back(name, lm_of, tmp_path):
    lm = lm_of(name)
    lm.save_to_preset(tmp_path / "preset")
    again = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "preset", preprocessor=None)
    assert_same_weights(lm.backbone, again.backbone)
    backbone = keras_mamba2.Mamba2HybridBackbone.from_preset(tmp_path / "preset")
    assert_same_weights(lm.backbone, backbone)


@families
def test_each_family_comes_from_a_hub_too(name, folder_of, lm_of, tmp_path, monkeypatch):
    files = {file.name: file.read_bytes() for file in folder_of(name).iterdir()}
    with serving(Hub({"user/model": files})) as address:
        point_client_to(address, tmp_path / "cache", monkeypatch)
        lm = keras_mamba2.Mamba2CausalLM.from_preset("hf://user/model", preprocessor=None)
    assert_same_weights(lm.backbone, lm_of(name).backbone)


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


def test_a_file_may_hold_what_is_shared_again(tmp_path):
    """As `torch.save` of a Zamba2 does, at each layer that shares it."""
    model = hybrids.random_model("zamba, two blocks")
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "copies").mkdir()
    shutil.copy(tmp_path / "plain" / "config.json", tmp_path / "copies")
    torch.save(tensors, tmp_path / "copies" / "pytorch_model.bin")
    plain, copies = (
        keras_mamba2.Mamba2HybridBackbone.from_preset(tmp_path / name)
        for name in ("plain", "copies")
    )
    assert_same_weights(copies, plain)
    shared = [name for name in tensors if ".shared_transformer.input_layernorm." in name]
    assert len(shared) > 2
    tensors[shared[-1]] += 1
    torch.save(tensors, tmp_path / "copies" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"{shared[-1]} differs from .*, which the model shares"):
        keras_mamba2.Mamba2HybridBackbone.from_preset(tmp_path / "copies")


def save_tensors(model, folder, **tensors):
    """A checkpoint of a model's configuration, and of tensors by any names."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    return keras_mamba2.Mamba2CausalLM.from_preset(folder, preprocessor=None)


@pytest.mark.parametrize("name", [*hybrids.FAMILIES, "nemotron", "granite, rotary"])
def test_names_in_memory_are_known_too(name, lm_of, tmp_path):
    """Those of `state_dict()`, where experts are stacked and Nemotron's begin otherwise."""
    model = hybrids.random_model(name)
    lm = save_tensors(model, tmp_path / "model", **model.state_dict())
    assert_same_weights(lm.backbone, lm_of(name).backbone)


@pytest.mark.parametrize("name", ["granite", "zamba, two blocks"])
def test_a_base_model_is_loaded(name, lm_of, tmp_path):
    """Whose head is its embedding."""
    model = hybrids.random_model(name)
    model.model.save_pretrained(tmp_path / "base")
    lm = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "base", preprocessor=None)
    assert_same_weights(lm.backbone, lm_of(name).backbone)


def test_a_base_model_without_its_head_says_so(tmp_path):
    hybrids.random_model("bamba").model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="missing in the files: lm_head.weight"):
        keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "base", preprocessor=None)


def test_frequencies_in_a_file_are_no_weights(lm_of, tmp_path):
    model = hybrids.random_model("bamba")
    buffer = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    lm = save_tensors(model, tmp_path / "model", **model.state_dict(), **buffer)
    assert_same_weights(lm.backbone, lm_of("bamba").backbone)


def test_sizes_of_what_a_model_lacks_may_be_zero(tmp_path):
    name = "nemotron, no bias"
    hybrids.random_model(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= dict.fromkeys(("n_routed_experts", "moe_intermediate_size", "n_group"), 0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    keras_mamba2.Mamba2HybridBackbone.from_preset(tmp_path)


@pytest.mark.parametrize("name", ["granite", "zamba, one block"])
def test_a_state_belongs_also_to_the_model_that_was_saved_again(name, lm_of, tmp_path):
    """In JSON, the pairs of a configuration are lists."""
    lm, ids = lm_of(name), random_ids(t=9)
    state = lm.prefill({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    state.save(tmp_path / "state", lm.backbone)
    lm.backbone.save_to_preset(tmp_path / "preset")
    again = keras_mamba2.Mamba2HybridBackbone.from_preset(tmp_path / "preset")
    assert again.architecture == lm.backbone.architecture
    found = keras_mamba2.Mamba2State.load(tmp_path / "state", again)
    np.testing.assert_array_equal(found.digest, state.digest)


def test_experts_of_any_name_are_described(tmp_path):
    mixture = {"kind": "mixture_of_experts", "intermediate_dim": 6, "num_experts_per_token": 2}
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=64,
        hidden_dim=8,
        blocks=["experts_1", "experts_up"],
        sublayers={
            "experts_1": {**mixture, "num_experts": 3},
            "experts_up": {**mixture, "num_experts": 5},
        },
    )
    backbone.save_to_preset(tmp_path)
    layers = [x for x in flatten_layers(backbone) if isinstance(x, MixtureOfExperts)]
    left_out = sum(
        (layer.num_experts - 2) / layer.num_experts * experts.count_params()
        for layer in layers
        for experts in (layer.experts_gate, layer.experts_up, layer.experts_down)
        if experts is not None
    )
    total = backbone.count_params()
    expected = f"{total:,}, of which a token uses {round(total - left_out):,}"
    assert describe(tmp_path)["parameters"] == expected


def test_more_experts_than_any_model_has_are_refused(tmp_path):
    """Names would be made for all of them, before the files are asked for any."""
    hybrids.random_model("nemotron, experts").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_routed_experts": 3_000_000}))
    with pytest.raises(ValueError, match="from 0 to 4096.*n_routed_experts=3000000"):
        keras_mamba2.Mamba2HybridBackbone.from_preset(tmp_path)


@pytest.mark.parametrize("name", ["nemotron", "zamba, one block"])
def test_small_steps_are_not_raised_after_an_export(name, lm_of, tmp_path):
    """As transformers does without a `time_step_min`. A limit above, which it lacks, is refused."""
    backbone = keras_mamba2.Mamba2HybridBackbone.from_config(lm_of(name).backbone.get_config())
    backbone.set_weights(lm_of(name).backbone.get_weights())
    for weight in backbone.weights:
        if weight.path.endswith("dt_bias"):
            weight.assign(weight - 6)
    conversion.export_to_transformers(backbone, None, tmp_path / "exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    ids = random_ids(t=9)
    expected = backbone.logits(backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(hybrids.logits(model, ids), expected, rtol=0, atol=64 * EPS * scale)
    config = backbone.get_config()
    config["sublayers"]["mamba2"]["time_step_limit"] = (0.001, 0.05)
    assert "lacks mamba2.time_step_limit" in exported(config)


def test_whole_multipliers_of_falcon_are_floats_in_the_file():
    """transformers takes no int for them."""
    for option, config in changed_models("falcon"):
        config = json.loads(json.dumps(config))
        for sublayer in (config, *config["sublayers"].values()):
            for key in [key for key in sublayer if key.endswith("_multiplier")]:
                sublayer[key] = 2
        written = exported(config)
        if isinstance(written, str):
            continue
        multipliers = {key: value for key, value in written.items() if "multiplier" in key}
        assert len(multipliers) > 6, option
        numbers = [n for v in multipliers.values() for n in (v if isinstance(v, list) else [v])]
        assert all(isinstance(number, float) for number in numbers), option


@pytest.mark.parametrize("kind", ["granite", "bamba"])
def test_an_expansion_that_is_not_whole_is_warned_of(kind):
    mixer = {"head_dim": 8, "expansion": 1.5}
    attention = {**SMALL["sublayers"]["attention"], "rotary_dim": 4 if kind == "bamba" else 0}
    sublayers = {**SMALL["sublayers"], "mamba2": mixer, "attention": attention}
    with pytest.warns(UserWarning, match="expansion=1.5 is not a whole number"):
        config_of(sublayers=sublayers)


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
