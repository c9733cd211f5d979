"""generate = one step after another, for any lengths, padding, chunk size and block sizes."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_mamba2
from keras_mamba2.generation import Generator
from keras_mamba2.generation import prompts_of
from tests.laws import examples

BLOCK_SIZES = [(512, 128, 32, 8), (16, 4), (5,)]
CHUNK_SIZES = [1, 3, 64]
NEW = 6


@pytest.fixture(scope="module")
def model_of(preset_folder):
    """A model and its step, by chunk size and dtype."""

    @functools.cache
    def model(chunk_size, dtype="float32"):
        backbone = keras_mamba2.Mamba2Backbone.from_preset(
            preset_folder, chunk_size=chunk_size, dtype=dtype
        )
        lm = keras_mamba2.Mamba2CausalLM(backbone)
        lm.compile(sampler="greedy")
        step = jax.jit(lambda token, state: lm.call_with_cache(token[None, None], state)[::2])
        return lm, step

    return model


@pytest.fixture(scope="module")
def generator_of(model_of):
    """One for each set of block sizes, so that nothing compiles twice."""

    @functools.cache
    def generator(chunk_size, sizes):
        generator = Generator(model_of(chunk_size)[0])
        generator.block_sizes = sizes
        return generator

    return generator


def step_by_step(lm, step, prompt, count):
    """What follows `prompt` greedily, and the state before the last token of it."""
    state, tokens = lm.backbone.initial_state(1), list(prompt)
    for i in range(len(prompt) + count - 1):
        logits, state = step(np.int32(tokens[i]), state)
        if i == len(tokens) - 1:
            tokens.append(int(logits[0, 0].argmax()))
    return tokens[len(prompt) :], state


def inputs_of(prompts, side):
    size = max(map(len, prompts)) + NEW
    token_ids, mask = np.full((len(prompts), size), 7), np.zeros((len(prompts), size), bool)
    for row, real, prompt in zip(token_ids, mask, prompts, strict=True):
        start = 0 if side == "right" else size - len(prompt)
        row[start : start + len(prompt)] = prompt
        real[start : start + len(prompt)] = True
    return {"token_ids": token_ids, "padding_mask": mask}


@pytest.mark.slow
@examples(40)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=2),
    side=st.sampled_from(["left", "right"]),
    chunk_size=st.sampled_from(CHUNK_SIZES),
    sizes=st.sampled_from(BLOCK_SIZES),
    seed=st.integers(0, 9),
)
def test_generate_is_step_by_step(model_of, generator_of, lengths, side, chunk_size, sizes, seed):
    lm, step = model_of(chunk_size)
    generator = generator_of(chunk_size, sizes)
    prompts = [np.random.default_rng([seed, n]).integers(0, 256, n) for n in lengths]
    read, _ = prompts_of(inputs_of(prompts, side))
    found = generator.generate(read, np.full(len(read), NEW), ())
    state = generator.prefill(prompts)
    for i, prompt in enumerate(prompts):
        new, _ = step_by_step(lm, step, prompt, NEW)
        assert (read[i].tolist(), found[i].tolist()) == (prompt.tolist(), new)
        _, expected = step_by_step(lm, step, prompt, 0)
        for ours, theirs in zip(
            jax.tree.leaves(state[i].layers), jax.tree.leaves(expected.layers), strict=True
        ):
            scale = max(1.0, float(np.abs(theirs).max()))
            np.testing.assert_allclose(ours, theirs, atol=3e-6 * scale, rtol=0)


@examples(10)
@given(length=st.integers(2, 60), cut=st.integers(1, 59))
def test_low_precision_continues_as_the_whole(model_of, length, cut):
    """In bfloat16 each activation is rounded to 8 bits, so the states agree to a few of those."""
    lm, _ = model_of(64, "bfloat16")
    prompt = np.random.default_rng(length).integers(0, 256, length)
    generator = lm.make_generate_function()
    whole = generator.prefill([prompt])
    cut = min(cut, length - 1)
    pieces = generator.prefill([prompt[cut:]], generator.prefill([prompt[:cut]]))
    for ours, theirs in zip(
        jax.tree.leaves(pieces.layers), jax.tree.leaves(whole.layers), strict=True
    ):
        ours, theirs = (np.asarray(leaf, "float32") for leaf in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=2**-5 * np.abs(theirs).max(), rtol=0)
