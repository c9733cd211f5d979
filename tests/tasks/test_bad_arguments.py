"""Arguments of the wrong type or value: an error that names them, before any work is done."""

import math

import keras
import keras_hub
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2 import FilterSampler

NAN, INF = math.nan, math.inf
IDS = np.array([[3, 1, 4, 1, 5]])
ROWS = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
NO_INTEGERS = [2.0, "5", NAN, True, [3], 1.5]

# name of the argument -> values that are none
GENERATION = {
    "max_new_tokens": [*NO_INTEGERS, 0, -1],
    "max_length": [*NO_INTEGERS, 0, -7],
    "stop_token_ids": [5, "end", [-1], [257], [2.0], ["a"], [None], [NAN], 3.5, ...],
    "stop_strings": ["", [""], [3], 3, [None], [b"a"], ["ok", ""]],
    "state": ["x", 3, [], np.zeros(3)],
    "seed": [1.5, "1", NAN, True],
    "temperature": [-0.1, NAN, INF, "1", [1.0], True],
    "top_k": [0, -1, 2.5, "3", NAN, True],
    "top_p": [0.0, 1.1, -1, NAN, INF, "1", True],
    "min_p": [-0.1, 1.1, NAN, "1"],
    "repetition_penalty": [0.5, 0, NAN, INF, "1"],
}
PROMPTS = [
    None,
    3,
    3.5,
    [None],
    [3],
    ["a", None],
    ["a", 3],
    ...,
    "\ud800",
    ["a", "b\udfff"],
    b"\xff\xfe",
    [b"ok", b"\xc3"],
    "",
    [],
    ["a", ""],
    {},
    {"token_ids": IDS},
    {"padding_mask": IDS},
    {"token_ids": IDS, "padding_mask": np.zeros_like(IDS)},
    {"token_ids": IDS + 300, "padding_mask": np.ones_like(IDS)},
    {"token_ids": IDS - 9, "padding_mask": np.ones_like(IDS)},
    np.zeros((2, 3)),
]
DATA = [
    {"token_ids": IDS * NAN},
    {"token_ids": IDS + 0.5},
    {"token_ids": IDS + 257},
    {"token_ids": -IDS},
    {"y": IDS * NAN},
    {"y": IDS + 0.5},
    {"y": IDS + 257},
    {"y": -IDS},
    {"padding_mask": IDS * NAN},
    {"padding_mask": np.array([[1, 0, 1, 1, 1]])},
    {"padding_mask": np.array([[1, 1, 2, 2, 0]])},
    {"padding_mask": np.array([[1, 1, 1, -1, 0]])},
    {"padding_mask": np.zeros_like(IDS)},
    {"sample_weight": -IDS},
    {"sample_weight": IDS * NAN},
    {"sample_weight": IDS * INF},
    {"sample_weight": np.zeros_like(IDS)},
    {"sample_weight": np.ones((1, 3))},
    {"y": np.ones((2, 5))},
]
SAMPLERS = ["gredy", "Greedy", "", "speculative", 3, None, ["greedy"], {}, keras.layers.Dense(3)]


@pytest.fixture(scope="module")
def lm(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler="greedy", optimizer="sgd", weighted_metrics=[])
    return lm


@pytest.fixture(scope="module")
def before(lm):
    return lm.generate("hello", max_new_tokens=3)


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(GENERATION), ids=repr)
def test_of_generate_and_stream_are_named(lm, before, name, value):
    for call in (lm.generate, lm.stream):
        with pytest.raises(ValueError, match=name if name != "stop_strings" else "stop"):
            call("hello", **{name: value})
    assert lm.generate("hello", max_new_tokens=3) == before


@pytest.mark.parametrize("value", [*NO_INTEGERS, 0, -1], ids=repr)
def test_num_return_sequences_is_named(lm, value):
    with pytest.raises(ValueError, match="num_return_sequences"):
        lm.generate("hello", num_return_sequences=value)


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: ascii(prompt)[:30])
def test_prompts_that_are_none(lm, prompt):
    pattern = "[Pp]rompt|[Ii]nput|UTF-8|[Tt]ext|dict"
    for call in (lm.generate, lm.prefill):
        with pytest.raises(ValueError, match=pattern):
            call(prompt)
    if not isinstance(prompt, dict):
        # No text at all has no perplexity: an empty list.
        for call in (lm.stream, lm.start, *([lm.perplexity] if len(np.atleast_1d(prompt)) else [])):
            with pytest.raises(ValueError, match=pattern + "|nothing"):
                list(call(prompt)) if call == lm.stream else call(prompt)


@pytest.mark.parametrize("change", DATA, ids=lambda change: str(change)[:45])
def test_rows_that_cannot_be_learned_from(lm, change):
    weights = [np.array(weight) for weight in lm.get_weights()]
    data = {**ROWS, "y": IDS, "sample_weight": np.ones(IDS.shape), **change}
    y, sample_weight = data.pop("y"), data.pop("sample_weight")
    for call in (lm.fit, lm.evaluate):
        with pytest.raises(ValueError, match="Token ids|Labels|mask|weight|token to learn"):
            call(data, y, sample_weight=sample_weight, verbose=0)
    for old, new in zip(weights, lm.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_ids": IDS + 999999},
        {"target_ids": -IDS},
        {"target_ids": IDS * NAN},
        {"target_ids": None},
        {"token_ids": IDS + 257},
        {"token_ids": -IDS},
        {"token_ids": IDS + 0.5},
        {"padding_mask": np.array([[1, 0, 1, 1, 1]])},
        {"padding_mask": np.array([[1, 1, 2, 2, 0]])},
        {"scoring_mode": "probabilities"},
    ],
    ids=lambda arguments: str(arguments)[:45],
)
def test_scores_of_what_does_not_exist(lm, arguments):
    arguments = {"token_ids": IDS, "target_ids": IDS, "scoring_mode": "loss", **arguments}
    with pytest.raises(ValueError, match="Token ids|Targets|target_ids|mask|scoring_mode"):
        lm.score(**arguments)


@pytest.mark.parametrize("stride", [*NO_INTEGERS, 1, 0, -3], ids=repr)
def test_stride_is_named(lm, stride):
    with pytest.raises(ValueError, match="stride"):
        lm.perplexity("hello", stride=stride)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: repr(sampler)[:20])
def test_samplers_that_are_none(lm, before, sampler):
    with pytest.raises(ValueError, match="sampler"):
        lm.compile(sampler=sampler)
    assert lm.generate("hello", max_new_tokens=3) == before


def test_a_name_close_to_a_sampler_s_is_suggested(lm):
    with pytest.raises(ValueError, match="Did you mean 'greedy'"):
        lm.compile(sampler="gredy")


@pytest.mark.parametrize(
    ("name", "value"),
    cases({k: GENERATION[k] for k in ("temperature", "top_k", "top_p", "min_p", "seed")}),
    ids=repr,
)
def test_of_a_filter_sampler_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        FilterSampler(**{name: value})


def test_what_searches_cannot_do_is_said_before_they_search(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2))
    for arguments in (
        {"max_new_tokens": 2**31},
        {"temperature": 0.5},
        {"num_return_sequences": 2},
        {"stop_strings": "a"},
        {"return_logprobs": True},
        {"state": lm.prefill("a")},
    ):
        with pytest.raises(ValueError, match="BeamSampler"):
            lm.generate("hello", **arguments)


def test_datasets_of_prompts_batched_or_not(lm, before):
    import grain
    import tensorflow as tf

    texts = ["hello", "hello"]
    tensors = tf.data.Dataset.from_tensor_slices(texts)
    source = grain.MapDataset.source(texts)
    for dataset in (tensors, tensors.batch(2), source, source.batch(1), source.to_iter_dataset()):
        assert lm.generate(dataset, max_new_tokens=3) == [before] * 2
    for one in (b"hello", np.str_("hello"), tf.constant("hello"), np.array("hello")):
        assert lm.generate(one, max_new_tokens=3) == before
    for several in (np.array(texts), tf.constant(texts), tuple(texts), [b"hello"] * 2):
        assert lm.generate(several, max_new_tokens=3) == [before] * 2
