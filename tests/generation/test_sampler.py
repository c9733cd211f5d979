"""Filters of probabilities, against a sort written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

import keras_mamba2
from keras_mamba2 import FilterSampler
from keras_mamba2.generation.sampling import least_kept

LOGITS = np.array([[2.0, 1.0, 0.0, -1.0, -2.0], [0.5, 3.0, 0.5, -3.0, 0.0]])


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def filtered(row, keep):
    kept = np.where(keep(row), row, 0)
    return kept / kept.sum()


def probabilities(logits=LOGITS, seen=None, **arguments):
    return ops.convert_to_numpy(FilterSampler(**arguments).compute_probabilities(logits, seen))


def test_without_filters_it_is_the_softmax():
    np.testing.assert_allclose(probabilities(), softmax(LOGITS), rtol=1e-5)
    np.testing.assert_allclose(probabilities(temperature=0.5), softmax(LOGITS * 2), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38])
def test_the_least_temperatures_are_greedy(temperature):
    np.testing.assert_array_equal(
        probabilities(100 * LOGITS, temperature=temperature), LOGITS.max(-1)[:, None] == LOGITS
    )


def test_top_k_keeps_the_k_likeliest():
    for row, found in zip(softmax(LOGITS), probabilities(top_k=2), strict=True):
        expected = filtered(row, lambda row: row >= np.sort(row)[-2])
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(probabilities(top_k=99), softmax(LOGITS), rtol=1e-5)


@pytest.mark.parametrize("top_p", [1e-30, 1e-40, 1e-300])
def test_the_least_top_p_keeps_the_likeliest(top_p):
    np.testing.assert_array_equal(probabilities(top_p=top_p), LOGITS.max(-1)[:, None] == LOGITS)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(p=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_top_p_keeps_the_fewest_that_sum_to_p(p, seed):
    logits = np.random.default_rng(seed).normal(size=(1, 9))
    [row], [found] = softmax(logits), probabilities(logits, top_p=p)
    order = np.argsort(-row)
    count = np.searchsorted(np.cumsum(row[order]), p - 1e-6) + 1
    assert set(np.flatnonzero(found)) == set(order[:count])
    assert found.sum() == pytest.approx(1, rel=1e-5)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    weights=st.lists(st.sampled_from([0, 1, 2, 3, 64, 2**20]), min_size=12, max_size=12),
    top_k=st.integers(1, 12),
    top_p=st.sampled_from([2.0**-20, 0.25, 0.5, 0.75, 1.0]),
)
def test_tokens_as_likely_as_one_that_is_kept_are_kept(weights, top_k, top_p):
    """Sums of whole numbers are exact: so is what is left, beside a sort."""
    row = np.array([*weights, 2**20], "float32")
    falling = np.sort(row)[::-1]
    falling = falling[falling >= falling[top_k - 1]]
    likelier = np.cumsum(falling) - falling
    least = falling[(likelier < top_p * falling.sum()) | (top_p == 1)].min()
    arguments = np.array([[top_k]], "int32"), np.array([[top_p]], "float32")
    found = ops.convert_to_numpy(least_kept(ops.convert_to_tensor(row[None] / 2**22), *arguments))
    np.testing.assert_array_equal(row / 2**22 >= found[0], row >= least)


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
    for row, found in zip(softmax(LOGITS), probabilities(min_p=0.1), strict=True):
        np.testing.assert_allclose(found, filtered(row, lambda row: row >= 0.1 * row.max()), 1e-5)


def test_filters_follow_one_another():
    found = probabilities(temperature=2.0, top_k=3, top_p=0.9, min_p=0.5)
    for row, its in zip(softmax(LOGITS / 2), found, strict=True):
        row = filtered(row, lambda row: row >= np.sort(row)[-3])
        order = np.argsort(-row)
        last = row[order[np.searchsorted(np.cumsum(row[order]), 0.9)]]
        row = filtered(row, lambda row, last=last: row >= last)
        np.testing.assert_allclose(its, filtered(row, lambda row: row >= 0.5 * row.max()), 1e-5)


def test_the_penalty_makes_what_was_there_less_likely():
    seen = np.array([[1, 0, 0, 0, 1]] * 2, bool)
    penalized = LOGITS.copy()
    penalized[:, 0] /= 1.5
    penalized[:, 4] *= 1.5
    found = probabilities(seen=seen, repetition_penalty=1.5)
    np.testing.assert_allclose(found, softmax(penalized), rtol=1e-5)


def test_draws_follow_the_probabilities():
    sampler = FilterSampler(top_k=3, seed=0)
    kept = np.repeat(probabilities(top_k=3)[:1], 4000, axis=0)
    counts = np.bincount(ops.convert_to_numpy(sampler.get_next_token(kept)), minlength=5)
    assert counts[3] == counts[4] == 0
    error = np.sqrt(kept[0] * (1 - kept[0]) / 4000)
    assert (np.abs(counts / 4000 - kept[0]) <= 4 * error).all()


def test_temperature_zero_is_greedy(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler="greedy")
    expected = lm.generate("hello", max_new_tokens=9)
    lm.compile(sampler=FilterSampler(temperature=0))
    assert lm.generate("hello", max_new_tokens=9) == expected


def test_a_large_penalty_forbids_repetition(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
    lm.compile(sampler=FilterSampler(temperature=0, repetition_penalty=1e6))
    token_ids = np.array([[5, 6, 7], [8, 9, 0]])
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    inputs = {"token_ids": token_ids, "padding_mask": mask}
    found = lm.generate(inputs, stop_token_ids=None, max_new_tokens=50)
    for row, is_token in zip(found["token_ids"], found["padding_mask"], strict=True):
        assert len(set(row[is_token])) == is_token.sum()


def test_config_comes_back():
    arguments = {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 3,
    }
    sampler = FilterSampler(**arguments)
    assert FilterSampler(**sampler.get_config()).get_config() == arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -0.1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.5},
    ],
)
def test_arguments_out_of_range_are_named(arguments):
    [(name, value)] = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        FilterSampler(**arguments)
