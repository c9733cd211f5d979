"""Models whose states grow with the text: keys and values beside what has one size."""

import functools
import math

import jax
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2.host import room as host_room
from keras_mamba2.layers import sublayer
from tests import reference

LEAST = 8  # tokens that fit at first, so that small texts grow too
NEW = 40


@pytest.fixture(autouse=True, scope="module")
def _little_room():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_room, "LEAST_ROOM", LEAST)
        patch.setattr(sublayer, "LEAST_ROOM", LEAST)
        yield


@pytest.fixture(scope="module")
def lm(byte_tokenizer):
    attention = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4}
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=257,
        hidden_dim=32,
        blocks=["mamba2", "attention", "mlp"],
        sublayers={
            "mamba2": {"state_dim": 8, "head_dim": 8, "chunk_size": 16},
            "attention": attention,
            "mlp": {"intermediate_dim": 48},
        },
    )
    reference.randomize(backbone)
    lm = keras_mamba2.Mamba2CausalLM(
        backbone, keras_mamba2.Mamba2CausalLMPreprocessor(byte_tokenizer, sequence_length=32)
    )
    lm.compile(sampler="greedy")
    return lm


@pytest.fixture(scope="module")
def generator(lm):
    return lm.make_generate_function()


@pytest.fixture(scope="module")
def greedy(lm):
    """What follows a prompt, by the whole model at each token."""
    forward = jax.jit(lambda ids, mask: lm({"token_ids": ids, "padding_mask": mask}))

    @functools.cache
    def tokens(prompt, count):
        text = list(prompt)
        for _ in range(count):
            ids, mask = np.zeros((1, 160), "int32"), np.zeros((1, 160), "int32")
            ids[0, : len(text)], mask[0, : len(text)] = text, 1
            text.append(int(np.asarray(forward(ids, mask))[0, len(text) - 1].argmax()))
        return text[len(prompt) :]

    return tokens


def prompt_of(length, seed=0):
    return tuple(np.random.default_rng([seed, length]).integers(0, 256, length).tolist())


@pytest.mark.parametrize("length", [1, 7, 8, 9, 20, 65])
def test_generate_is_the_whole_model_at_each_token(generator, greedy, length):
    prompt = prompt_of(length)
    found = generator.generate([np.array(prompt)], np.array([NEW]), ())[0]
    assert found.tolist() == greedy(prompt, NEW)


@pytest.mark.parametrize("length", [3, LEAST])
def test_a_model_called_without_a_state_leaves_room_for_more(lm, greedy, length):
    """As a user calls it, who has not said how long the text becomes."""
    read = jax.jit(lambda token_ids: lm.call_with_cache(token_ids, None))
    step = jax.jit(lm.call_with_cache)
    prompt = prompt_of(length)
    logits, _, state = read(np.array([prompt]))
    text = []
    for _ in range(LEAST - length % LEAST):
        text.append(int(np.asarray(logits)[0, -1].argmax()))
        logits, _, state = step(np.array([text[-1:]]), state)
    assert np.isfinite(logits).all()
    assert text == greedy(prompt, len(text))


def test_rows_of_other_lengths_and_places_are_what_they_are_alone(generator, greedy):
    prompts = [prompt_of(n, seed=1) for n in (3, 40, 17)]
    limits = np.array([NEW, 5, 21])
    found = generator.generate([np.array(p) for p in prompts], limits, ())
    for prompt, limit, row in zip(prompts, limits, found, strict=True):
        assert row.tolist() == greedy(prompt, int(limit))
    rows = generator.start([np.array(prompts[0])] * 2, np.array([NEW, 3]))
    rows, first, _ = generator.advance(rows, 10)
    rows = generator.insert(rows, 1, generator.start([np.array(prompts[1])], np.array([30])))
    decoding = generator.decode(rows)
    kept, put = decoding.all_tokens()
    assert [*np.asarray(first)[0, :10], *kept] == greedy(prompts[0], NEW)
    assert put.tolist() == greedy(prompts[1], 30)


@pytest.mark.parametrize("cut", [1, 8, 30])
def test_continued_is_the_whole(generator, greedy, cut):
    prompt = prompt_of(50, seed=2)
    state = generator.prefill([np.array(prompt[:cut])])
    before = jax.tree.map(np.asarray, state)
    rows = generator.start([np.array(prompt[cut:])], np.array([NEW]), state=state)
    assert generator.decode(rows).all_tokens()[0].tolist() == greedy(prompt, NEW)
    for old, now in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(old, now)  # who continues it leaves it as it was


def test_room_doubles_so_that_few_programs_are_compiled(lm):
    lm.make_generate_function()
    lm.generate_function = None
    generator = lm.make_generate_function()
    generator.generate([np.array(prompt_of(3))], np.array([130]), ())
    sizes = generator._decode.program._cache_size()
    assert sizes <= 1 + math.log2(256 / LEAST)
    assert host_room.room_for(257) == 512


def test_sessions_fork_save_and_resume(lm, tmp_path):
    session = lm.start("It is a truth ")
    session.generate("universally", max_new_tokens=20)
    left, right = session.fork(2)
    expected = left.generate(" x", max_new_tokens=20)
    right.save(tmp_path / "state.safetensors")
    again = lm.resume(tmp_path / "state.safetensors")
    assert right.generate(" y", max_new_tokens=20) != expected
    assert again.generate(" x", max_new_tokens=20) == expected


def test_a_stream_is_generate_with_stop_strings(lm):
    whole = lm.generate("ROMEO:", max_new_tokens=60, strip_prompt=True)
    assert "".join(lm.stream("ROMEO:", max_new_tokens=60)) == whole
    stop = whole[20:22]
    expected = whole[: whole.index(stop)]
    assert "".join(lm.stream("ROMEO:", max_new_tokens=60, stop_strings=stop)) == expected


def test_sampled_rows_are_what_they_are_alone(lm):
    lm.compile(sampler=keras_mamba2.FilterSampler(temperature=0.9, top_p=0.9))
    prompts = ["ROMEO:", "A long prompt that needs more room than the others. "]
    together = lm.generate(prompts, max_new_tokens=30, seed=3)
    assert together == [lm.generate(prompt, max_new_tokens=30, seed=3) for prompt in prompts]
    lm.compile(sampler="greedy")


@pytest.mark.parametrize("sampler", ["beam", "contrastive"])
def test_samplers_with_loops_of_their_own(lm, greedy, sampler):
    import keras_hub

    samplers = {
        "beam": keras_hub.samplers.BeamSampler(num_beams=1),
        "contrastive": keras_hub.samplers.ContrastiveSampler(k=1, alpha=0.0),
    }
    lm.compile(sampler=samplers[sampler])
    prompt = prompt_of(6, seed=4)
    inputs = {
        "token_ids": np.array([[*prompt, *[0] * 14]]),
        "padding_mask": np.array([[1] * 6 + [0] * 14]),
    }
    found = lm.make_generate_function()(inputs)["token_ids"][0, 6:]
    assert np.asarray(found).tolist() == greedy(prompt, 14)
    lm.compile(sampler="greedy")


@pytest.mark.slow
def test_perplexity_is_that_of_the_loss(lm):
    text = "To be, or not to be, that is the question: whether 'tis nobler in the mind"
    ids = np.frombuffer(text.encode(), "uint8").astype("int32")
    logits = lm({"token_ids": ids[None], "padding_mask": np.ones((1, len(ids)))})
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1), "float64")[0, :-1]
    expected = np.exp(-logprobs[np.arange(len(ids) - 1), ids[1:]].mean())
    assert abs(lm.perplexity(text) / expected - 1) < 1e-5


@pytest.fixture(scope="module")
def rounded(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "preset"
    lm.save_to_preset(folder)
    rounded = keras_mamba2.Mamba2CausalLM.from_preset(str(folder), key_value_dtype="int8")
    rounded.compile(sampler="greedy")
    return rounded


class TestKeysAndValuesInInt8:
    def test_text_goes_on_as_if_it_was_one(self, rounded):
        generator = rounded.make_generate_function()
        prompts = [np.array(prompt_of(n)) for n in (3, 21)]
        limits = np.array([NEW, NEW])
        whole = generator.generate(prompts, limits, ())
        state = generator.prefill([prompt[:2] for prompt in prompts])
        rows = generator.start([prompt[2:] for prompt in prompts], limits, state=state)
        for ours, theirs in zip(generator.decode(rows).all_tokens(), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        alone = generator.generate(prompts[1:], limits[1:], ())
        np.testing.assert_array_equal(alone[0], whole[1])

    def test_a_token_takes_less(self, lm, rounded, tmp_path):
        states = [model.prefill("to be, or not to be").layers[1] for model in (lm, rounded)]
        float32, int8 = (sum(leaf.nbytes for leaf in jax.tree.leaves(state)) for state in states)
        assert int8 < 0.4 * float32  # of 8 numbers with a scale
        session = rounded.start("to be, or not")
        session.save(tmp_path / "session.safetensors")
        again = rounded.resume(tmp_path / "session.safetensors")
        assert again.generate(max_new_tokens=9) == session.generate(max_new_tokens=9)
        with pytest.raises(ValueError, match=r"session\.safetensors"):
            lm.resume(tmp_path / "session.safetensors")

    def test_a_saved_model_keeps_it(self, rounded, tmp_path):
        rounded.save_to_preset(tmp_path / "preset")
        again = keras_mamba2.Mamba2HybridBackbone.from_preset(str(tmp_path / "preset"))
        assert again.key_value_dtype == "int8"

    @pytest.mark.parametrize("value", ["int4", "float32", 8])
    def test_another_dtype_is_refused(self, rounded, value):
        with pytest.raises(ValueError, match="key_value_dtype"):
            keras_mamba2.Mamba2CausalLM.from_preset("granite_4.0_h_350m", key_value_dtype=value)

    def test_a_model_without_attention_has_none(self):
        preset = "mamba2_tiny_shakespeare"
        with pytest.raises(ValueError, match="has a `key_value_dtype`"):
            keras_mamba2.Mamba2CausalLM.from_preset(preset, key_value_dtype="int8")
