"""Models whose blocks are stacked: the same tokens and states, of programs with one block."""

import tempfile

import jax
import keras
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2._compat.keras_variables import has_value
from keras_mamba2.generation import Generator
from keras_mamba2.models.stacked_blocks import FOR_INFERENCE
from tests import reference

PROMPTS = [list(range(5, 45)), [3], list(range(100, 107))]
NEW = 12
ATTENTION = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4}
SUBLAYERS = {
    "mamba2": {"state_dim": 8, "head_dim": 8, "chunk_size": 16},
    "attention": ATTENTION,
}


def hybrid(blocks):
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=257,
        hidden_dim=32,
        blocks=blocks,
        sublayers={kind: SUBLAYERS[kind] for kind in blocks},
    )
    reference.randomize(backbone)
    return backbone


def mamba2(dtype="float32", **changes):
    backbone = keras_mamba2.Mamba2Backbone(
        **{"vocabulary_size": 257, "num_layers": 3, "hidden_dim": 32, "state_dim": 8}
        | {"head_dim": 8, "num_groups": 2, "chunk_size": 16, "dtype": dtype}
        | changes
    )
    reference.randomize(backbone)
    return backbone


def quantized(mode):
    backbone = mamba2()
    backbone.quantize(mode)
    return backbone


MODELS = {
    "mamba2": mamba2,
    "bfloat16": lambda: mamba2("bfloat16"),
    "mixed_bfloat16": lambda: mamba2("mixed_bfloat16"),
    "state_dtype": lambda: mamba2(state_dtype="bfloat16"),
    "int8": lambda: quantized("int8"),
    "int4": lambda: quantized("int4"),
    "attention": lambda: hybrid(["attention", "attention"]),
}


def pair_of(make, **arguments):
    """The same model twice, the second one stacked."""
    apart, stacked = (
        keras_mamba2.Mamba2CausalLM(backbone, preprocessor=None) for backbone in (make(), make())
    )
    stacked.set_weights(apart.get_weights())
    stacked.stack_blocks()
    for lm in (apart, stacked):
        lm.compile(sampler="greedy", **arguments)
    return apart, stacked


FAST = ("mamba2", "int8", "attention")
PARAMETERS = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS
]


@pytest.fixture(scope="module", params=PARAMETERS)
def pair(request):
    return pair_of(MODELS[request.param])


@pytest.fixture(scope="module")
def plain():
    return pair_of(mamba2)


def tokens_of(lm, generator=None):
    generator = generator or lm.make_generate_function()
    rows = generator.start([np.array(p, "int32") for p in PROMPTS], np.full(len(PROMPTS), NEW))
    return [row.tolist() for row in generator.decode(rows).all_tokens()]


def assert_states_agree(found, expected, atol=1e-5):
    assert len(found.layers) == len(expected.layers)
    leaves = zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True)
    for ours, theirs in leaves:
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        ours, theirs = (np.asarray(leaf, "float32") for leaf in (ours, theirs))
        scale = max(1.0, float(np.abs(theirs).max()))
        np.testing.assert_allclose(ours, theirs, atol=atol * scale, rtol=0)


def test_tokens_are_those_of_blocks_apart(pair):
    apart, stacked = pair
    assert tokens_of(stacked) == tokens_of(apart)


def test_states_are_those_of_blocks_apart_and_either_model_continues_them(plain):
    apart, stacked = plain
    prompts = [np.array(p, "int32") for p in PROMPTS]
    ours, theirs = (lm.make_generate_function().prefill(prompts) for lm in (stacked, apart))
    assert_states_agree(ours, theirs)
    more = [np.array([7, 8, 9], "int32")] * 3
    continued = [
        lm.make_generate_function().prefill(more, state)
        for lm, state in ((stacked, theirs), (apart, ours))
    ]
    assert_states_agree(*continued)


def test_states_of_attention_grow():
    apart, stacked = pair_of(MODELS["attention"])
    prompts = [np.arange(300) % 257, np.array([1, 2])]
    ours, theirs = (lm.make_generate_function().prefill(prompts) for lm in (stacked, apart))
    assert_states_agree(ours, theirs)


def test_searches_and_files_of_states_are_those_of_blocks_apart(plain, tmp_path):
    found = []
    for lm, other in (plain, plain[::-1]):
        state = lm.make_generate_function().prefill([np.array(PROMPTS[0], "int32")])
        lm.save_state(tmp_path / "state.safetensors", state)
        loaded = keras_mamba2.Mamba2State.load(tmp_path / "state.safetensors", other.backbone)
        assert_states_agree(loaded, state, atol=0)
    for lm in plain:
        lm.compile(sampler="beam")
        token_ids = np.array([PROMPTS[0]])
        inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
        found.append(
            lm.generate(inputs, stop_token_ids=[3], max_new_tokens=6)["token_ids"].tolist()
        )
        lm.compile(sampler="greedy")
    assert found[0] == found[1]


def test_a_state_made_in_a_call_has_room_for_more():
    logits = []
    for lm in pair_of(MODELS["attention"]):
        _, _, state = jax.jit(lambda ids, lm=lm: lm.call_with_cache(ids, None))(np.array([[1, 2]]))
        logits.append(np.asarray(jax.jit(lm.call_with_cache)(np.array([[3]]), state)[0]))
    np.testing.assert_allclose(*logits, atol=1e-5 * np.abs(logits).max(), rtol=0)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("steps_a_write", [4, 5])
def test_a_state_that_is_written_every_few_steps(plain, steps_a_write):
    apart, stacked = plain
    found = tokens_of(stacked, generator=Generator(stacked, steps_a_write))
    assert found == tokens_of(apart)


def test_seeded_samples_and_logits(plain):
    token_ids = np.array([PROMPTS[0]])
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    found = []
    for lm in plain:
        lm.compile(sampler=keras_mamba2.FilterSampler(temperature=0.7, top_k=20))
        out = lm.generate(inputs, max_new_tokens=NEW, seed=3, stop_token_ids=None)
        found.append(np.asarray(out["token_ids"]).tolist())
        lm.compile(sampler="greedy")
    assert found[0] == found[1]
    logits = [np.asarray(lm.call_with_cache(token_ids, None)[0]) for lm in plain]
    np.testing.assert_allclose(*logits, atol=1e-5 * np.abs(logits).max(), rtol=0)


def test_speculation():
    apart, stacked = pair_of(mamba2, speculation=keras_mamba2.PromptLookup(3))
    assert tokens_of(stacked) == tokens_of(apart)


def test_a_program_does_not_grow_with_the_layers():
    def operations(num_layers):
        backbone = mamba2(num_layers=num_layers)
        lm = keras_mamba2.Mamba2CausalLM(backbone, preprocessor=None)
        lm.stack_blocks()
        lm.compile(sampler="greedy")
        generator = Generator(lm)
        rows = generator.start([np.array([1, 2, 3], "int32")], np.array([2]))
        weights = [v.value for v in backbone.stacked.in_place_of_theirs(backbone.variables)]
        text = generator._decode.program.lower(weights, rows, (np.int32(1),)).as_text()
        return text.count("dot_general")

    assert operations(2) == operations(5) > 0


def test_a_preset_is_stacked_when_it_is_loaded(preset_folder):
    def built(lm):
        lm.compile(sampler="greedy")
        assert not any(map(has_value, lm.backbone.stacked.variables))
        lm.warm_up(prompt_lengths=[9])

    apart = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    apart.compile(sampler="greedy")
    stacked = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, stacked=True, on_built=built)
    texts = ["To be, or", "Hello"]
    assert stacked.generate(texts, max_length=20) == apart.generate(texts, max_length=20)
    alone = [lm.generate(texts[0], max_length=20) for lm in (stacked, apart)]
    assert alone[0] == alone[1]
    assert all(map(has_value, stacked.backbone.stacked.variables))
    assert not any(has_value(v) for block in stacked.backbone.blocks for v in block.variables)


def load_adapter(lm):
    with tempfile.TemporaryDirectory() as folder:
        other = keras_mamba2.Mamba2CausalLM.from_config(lm.get_config())
        other.backbone.enable_lora(2, ["in_proj"])
        other.save_peft_adapter(folder)
        lm.load_peft_adapter(folder)


REFUSED = {
    "call": lambda lm, folder: lm({"token_ids": np.ones((1, 4)), "padding_mask": np.ones((1, 4))}),
    "fit": lambda lm, folder: lm.fit(["Hello you"]),
    "evaluate": lambda lm, folder: lm.evaluate(["Hello you"]),
    "quantize": lambda lm, folder: lm.quantize("int8"),
    "quantize the backbone": lambda lm, folder: lm.backbone.quantize("int4"),
    "enable_lora": lambda lm, folder: lm.backbone.enable_lora(2),
    "save": lambda lm, folder: lm.save(folder / "model.keras"),
    "save_weights": lambda lm, folder: lm.save_weights(folder / "a.weights.h5"),
    "save_to_preset": lambda lm, folder: lm.save_to_preset(folder / "preset"),
    "export": lambda lm, folder: lm.export_to_transformers(folder / "transformers"),
    "programs": lambda lm, folder: lm.export_programs(folder / "programs", platforms=["cpu"]),
    "load_peft_adapter": lambda lm, folder: load_adapter(lm),
    "load_weights": lambda lm, folder: lm.load_weights(folder / "a.weights.h5"),
    "set_weights": lambda lm, folder: lm.set_weights([np.zeros(v.shape) for v in lm.weights]),
}


@pytest.fixture(scope="module")
def stacked_preset(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, stacked=True)
    lm.compile(sampler="greedy")
    return lm


@pytest.mark.parametrize("what", list(REFUSED))
@pytest.mark.filterwarnings("ignore:.*shuffle=True.*:UserWarning")
def test_what_needs_blocks_apart_is_refused_and_changes_nothing(stacked_preset, what, tmp_path):
    before = stacked_preset.generate("Hello", max_length=12)
    with pytest.raises(ValueError, match=FOR_INFERENCE[:40]):
        REFUSED[what](stacked_preset, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert stacked_preset.generate("Hello", max_length=12) == before


def test_blocks_that_differ_are_refused():
    lm = keras_mamba2.Mamba2CausalLM(hybrid(["mamba2", "attention"]), preprocessor=None)
    with pytest.raises(ValueError, match=r"Only blocks that .* Received: block_0 and block_1"):
        lm.stack_blocks()
    assert lm.backbone.stacked is None


def test_policies_that_differ_are_refused():
    """Weights and configurations are the same: the map's."""
    policies = keras.dtype_policies.DTypePolicyMap(
        "mixed_bfloat16", {"block_1/.*": keras.DTypePolicy("float32")}
    )
    lm = keras_mamba2.Mamba2CausalLM(mamba2(dtype=policies), preprocessor=None)
    with pytest.raises(ValueError, match=r"Only blocks that .* Received: block_0 and block_1"):
        lm.stack_blocks()


def test_adapters_that_differ_are_refused():
    lm = keras_mamba2.Mamba2CausalLM(mamba2(), preprocessor=None)
    lm.backbone.enable_lora(2)
    lm.backbone.blocks[1].projections[0].lora_alpha = 8
    with pytest.raises(ValueError, match="Only blocks that are all alike"):
        lm.stack_blocks()


def test_other_backends_are_refused(monkeypatch):
    lm = keras_mamba2.Mamba2CausalLM(mamba2(), preprocessor=None)
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(ValueError, match="on JAX only. Received: .*'torch'"):
        lm.stack_blocks()


def test_a_distribution_is_refused():
    lm = keras_mamba2.Mamba2CausalLM(mamba2(), preprocessor=None)
    with keras.distribution.DataParallel().scope():
        with pytest.raises(ValueError, match="not stacked in a distribution"):
            lm.stack_blocks()
