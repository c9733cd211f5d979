"""Arguments of preprocessors, tasks and their data: named, before work is done."""

import keras
import keras_hub
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2 import Mamba2Backbone
from keras_mamba2 import Mamba2CausalLM
from keras_mamba2 import Mamba2CausalLMPreprocessor
from keras_mamba2 import Mamba2Forecaster
from keras_mamba2 import Mamba2TextClassifier
from keras_mamba2 import Mamba2TextClassifierPreprocessor
from keras_mamba2 import Mamba2Tokenizer
from tests import bad_values
from tests.bad_values import INF
from tests.bad_values import NAN
from tests.bad_values import NO_BOOLEAN
from tests.bad_values import NO_DTYPE
from tests.bad_values import NO_OPTIONAL_SIZE
from tests.bad_values import NO_POSITIVE
from tests.bad_values import NO_RATE
from tests.bad_values import NO_SIZE
from tests.bad_values import named

PREPROCESSOR = {
    "tokenizer": [None, "x", 3, {}],
    "sequence_length": NO_SIZE,
    "add_start_token": NO_BOOLEAN,
    "add_end_token": NO_BOOLEAN,
    "dtype": NO_DTYPE,
    "name": [3],
}
TINY = "mamba2_tiny_shakespeare"


@named(PREPROCESSOR | {"packing": NO_BOOLEAN})
def test_of_a_causal_lm_preprocessor(byte_tokenizer, name, value):
    arguments = {"tokenizer": byte_tokenizer, name: value}
    bad_values.assert_argument_refused(Mamba2CausalLMPreprocessor, name, **arguments)


@named(PREPROCESSOR | {"truncate": ["robin", None, 3, ["waterfall"]]})
def test_of_a_classifier_preprocessor(byte_tokenizer, name, value):
    arguments = {"tokenizer": byte_tokenizer, name: value}
    bad_values.assert_argument_refused(Mamba2TextClassifierPreprocessor, name, **arguments)


@pytest.mark.parametrize("value", NO_OPTIONAL_SIZE, ids=repr)
def test_of_a_preprocessor_s_call(byte_tokenizer, value):
    preprocessor = Mamba2CausalLMPreprocessor(byte_tokenizer)
    for call in (preprocessor, preprocessor.generate_preprocess):
        with pytest.raises(ValueError, match="`sequence_length` must be a positive integer, or No"):
            call("hello", sequence_length=value)
    if value is not None:
        with pytest.raises(ValueError, match="`sequence_length` must be a positive integer. Rec"):
            preprocessor.sequence_length = value
    assert preprocessor.sequence_length == 1024


@pytest.fixture(scope="module")
def backbone():
    return Mamba2Backbone(257, 1, 8, state_dim=4, head_dim=4)


@named(
    {
        "backbone": [None, "x", 3, keras.layers.Dense(3)],
        "num_classes": NO_SIZE,
        "preprocessor": ["x", 3, [1]],
        "activation": ["sofmax", 3, ["relu"]],
        "hidden_dim": NO_OPTIONAL_SIZE,
        "dropout": NO_RATE,
        "name": [3],
        "trainable": ["x"],
    }
)
def test_of_a_classifier(backbone, name, value):
    arguments = {"backbone": backbone, "num_classes": 2, name: value}
    bad_values.assert_argument_refused(Mamba2TextClassifier, name, **arguments)


@named(
    {
        "backbone": [None, "x", 3],
        "preprocessor": ["x", 3, keras.layers.Dense(3)],
        "trainable": ["x"],
    }
)
def test_of_a_causal_lm(backbone, name, value):
    bad_values.assert_argument_refused(Mamba2CausalLM, name, **{"backbone": backbone, name: value})


@named(
    {
        "horizon": NO_SIZE,
        "num_features": NO_SIZE,
        "output_features": [0, 3, -1, [2], [-1], [0.5], "1", [], [0, 0], True, NAN, {0: 1}, [[0]]],
        "num_layers": NO_SIZE,
        "hidden_dim": NO_SIZE,
        "state_dim": NO_SIZE,
        "head_dim": [*NO_SIZE, 3],
        "num_groups": [*NO_SIZE, 3],
        "expansion": NO_POSITIVE,
        "conv_kernel_size": NO_SIZE,
        "chunk_size": NO_OPTIONAL_SIZE,
        "dropout": NO_RATE,
        "dtype": NO_DTYPE,
    }
)
def test_of_a_forecaster(name, value):
    small = {"horizon": 2, "num_features": 2, "hidden_dim": 8, "state_dim": 4, "head_dim": 4}
    match = f"`{name}` must .*(?s:.*)Received: (.*{name}=)?"
    bad_values.assert_refused(Mamba2Forecaster, **small | {name: value}, match=match)


@pytest.mark.parametrize("keyword", ["num_class", "preprocesor", "dropout_rate", "vocabulary_size"])
def test_unknown_keywords(backbone, byte_tokenizer, keyword):
    for cls, arguments in (
        (Mamba2CausalLM, {"backbone": backbone}),
        (Mamba2TextClassifier, {"backbone": backbone, "num_classes": 2}),
        (Mamba2Forecaster, {"horizon": 1}),
        (Mamba2CausalLMPreprocessor, {"tokenizer": byte_tokenizer}),
        (Mamba2TextClassifierPreprocessor, {"tokenizer": byte_tokenizer}),
    ):
        match = f"`{cls.__name__}` has no argument `{keyword}`"
        bad_values.assert_refused(cls, **arguments, **{keyword: 1}, match=match)


@named(
    {
        "num_layres": [2],
        "sequence_length": NO_SIZE,
        "packing": NO_BOOLEAN,
        "load_weights": NO_BOOLEAN,
        "preprocessor": ["x", 3],
        "dtype": NO_DTYPE,
    }
)
def test_of_from_preset(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Mamba2CausalLM.from_preset(TINY, **{name: value})


@pytest.mark.parametrize(
    ("cls", "keyword", "value"),
    [
        (Mamba2Backbone, "num_layres", 2),
        (Mamba2Backbone, "sequence_length", 8),
        (Mamba2Backbone, "dropout", NAN),
        (Mamba2Backbone, "dtype", "x"),
        (Mamba2Backbone, "load_weights", 1),
        (Mamba2Tokenizer, "dtype", "float32"),
        (Mamba2Tokenizer, "sequence_length", 8),
        (Mamba2CausalLMPreprocessor, "sequence_length", 0),
        (Mamba2CausalLMPreprocessor, "dropout", 0.1),
        (Mamba2TextClassifierPreprocessor, "sequence_length", 1.5),
        (Mamba2TextClassifierPreprocessor, "packing", True),
        (Mamba2TextClassifier, "num_classes", 1.5),
        (Mamba2TextClassifier, "num_class", 2),
        (Mamba2TextClassifier, "load_weights", "no"),
    ],
    ids=repr,
)
def test_of_from_preset_of_all_kinds(cls, keyword, value):
    arguments = {"num_classes": 2} if cls is Mamba2TextClassifier else {}
    with pytest.raises(ValueError, match=f"`{keyword}`"):
        cls.from_preset(TINY, **arguments | {keyword: value})


SAMPLERS = keras_hub.samplers


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (cls, name, value)
        for cls, names in {
            SAMPLERS.GreedySampler: {"temperature": [NAN, "1"]},
            SAMPLERS.RandomSampler: {"temperature": NO_POSITIVE},
            SAMPLERS.TopKSampler: {"temperature": [0, NAN], "k": NO_SIZE},
            SAMPLERS.TopPSampler: {
                "temperature": [0, NAN],
                "p": [0, NAN, 1.1, -0.5, "1", None],
                "k": NO_OPTIONAL_SIZE,
            },
            SAMPLERS.BeamSampler: {
                "num_beams": NO_SIZE,
                "temperature": [NAN],
                "return_all_beams": [True],
            },
            SAMPLERS.ContrastiveSampler: {"k": NO_SIZE, "alpha": [NAN, -0.1, 1.5, "1", None]},
        }.items()
        for name, values in names.items()
        for value in values
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else repr(value)[:20],
)
def test_samplers_of_keras_hub_are_looked_at_when_compiled(lm, cls, name, value):
    sampler = cls(**{name: value})
    before = lm.sampler
    bad_values.assert_argument_refused(lm.compile, name, sampler=sampler)
    assert lm.sampler is before


@pytest.fixture(scope="module")
def lm(backbone, byte_tokenizer):
    lm = Mamba2CausalLM(backbone, Mamba2CausalLMPreprocessor(byte_tokenizer, sequence_length=8))
    lm.compile(sampler="greedy", optimizer="sgd", weighted_metrics=[])
    return lm


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, NAN, "1", True], ids=repr)
def test_seeds_that_no_generator_takes(seed):
    bad_values.assert_argument_refused(keras_mamba2.FilterSampler, "seed", seed=seed)


@named({"strip_prompt": NO_BOOLEAN, "return_logprobs": NO_BOOLEAN})
def test_flags_of_generate(lm, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be True or False"):
        lm.generate("hello", max_new_tokens=1, **{name: value})


@pytest.mark.parametrize("state", ["x", 3, [], np.zeros(3)], ids=repr)
def test_states_that_are_none(lm, state):
    with pytest.raises(ValueError, match="`state` must be a `Mamba2State`"):
        lm.prefill("a", state)
    with pytest.raises(ValueError, match="`state` must be a `Mamba2State`"):
        lm.call_with_cache(np.ones((1, 2), "int32"), state)


@named({"path": [3, None, []], "dtype": ["x", 3]})
def test_of_an_export(lm, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        lm.export_to_transformers(**{"path": tmp_path / "x", name: value})


def test_a_compilation_cache_is_a_path(lm):
    for value in (3, ["a"], True):
        bad_values.assert_argument_refused(lm.compile, "compilation_cache", compilation_cache=value)


TEXTS, LABELS = ["ab", "cd", "ef"], [0, 1, 0]


@pytest.fixture(scope="module")
def classifier(backbone, byte_tokenizer):
    preprocessor = Mamba2TextClassifierPreprocessor(byte_tokenizer, sequence_length=8)
    classifier = Mamba2TextClassifier(backbone, 2, preprocessor)
    classifier.compile(optimizer="sgd")
    return classifier


@pytest.mark.parametrize(
    "change",
    [
        {"x": []},
        {"x": [], "y": []},
        {"x": None},
        {"x": 3},
        {"x": "ab"},
        {"x": b"ab"},
        {"x": {}},
        {"x": ()},
        {"x": np.zeros((0,), object)},
        {"x": ["ab", None, "c"]},
        {"x": ["ab", 3, "c"]},
        {"x": ["ab", "\ud800", "c"]},
        {"x": [b"ab", b"\xff", b"c"]},
        {"x": np.zeros((3, 2))},
        {"x": (TEXTS, ["a", "b", 3])},
        {"y": None},
        {"y": [NAN, 0, 1]},
        {"y": [0.5, 0, 1]},
        {"y": [2, 0, 1]},
        {"y": [-1, 0, 1]},
        {"y": ["0", "0", "1"]},
        {"y": [None, 0, 1]},
        {"y": [INF, 0, 1]},
        {"sample_weight": [1, -1, 1]},
        {"sample_weight": [1, NAN, 1]},
        {"sample_weight": [1, INF, 1]},
        {"sample_weight": ["1", "1", "1"]},
    ],
    ids=ascii,
)
def test_data_that_a_classifier_cannot_learn_from(classifier, change):
    before = [np.array(weight) for weight in classifier.get_weights()]
    data = {"x": TEXTS, "y": LABELS, **change}
    pattern = "[Ss]ample|prompt must be|UTF-8|Labels|sample_weight|There is no|missing"
    for call in (classifier.fit, classifier.evaluate):
        bad_values.assert_refused(call, **data, verbose=0, match=pattern)
    if set(change) == {"x"}:
        bad_values.assert_refused(classifier.predict, data["x"], verbose=0, match=pattern)
    for old, new in zip(before, classifier.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


IDS = np.array([[3, 1, 4], [1, 5, 9]])
MASK = np.ones_like(IDS)


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": IDS * NAN},
        {"token_ids": IDS + 0.5},
        {"token_ids": IDS + 257},
        {"token_ids": -IDS},
        {"token_ids": IDS.astype(str)},
        {"token_ids": IDS[0]},
        {"token_ids": IDS[:, :2]},
        {"padding_mask": MASK * NAN},
        {"padding_mask": np.array([[1, 0, 1], [1, 1, 1]])},
        {"padding_mask": np.array([[1, 2, 0], [1, 1, 1]])},
        {"padding_mask": -MASK},
        {"padding_mask": np.array([[0, 0, 0], [1, 1, 1]])},
        {"padding_mask": MASK[:1]},
        {"padding_mask": MASK[0]},
    ],
    ids=lambda change: str(change)[:50],
)
def test_rows_that_a_classifier_cannot_learn_from(backbone, change):
    classifier = Mamba2TextClassifier(backbone, 2)
    classifier.compile(optimizer="sgd")
    rows = {"token_ids": IDS, "padding_mask": MASK, **change}
    pattern = "Token ids|mask|Row"
    for call in (classifier.fit, classifier.evaluate):
        bad_values.assert_refused(call, rows, [0, 1], verbose=0, match=pattern)
    bad_values.assert_refused(classifier.predict, rows, verbose=0, match=pattern)


def test_one_hot_labels_are_finite(backbone):
    classifier = Mamba2TextClassifier(backbone, 2)
    classifier.compile(optimizer="sgd", loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    rows = {"token_ids": IDS, "padding_mask": MASK}
    labels = np.array([[1, 0], [NAN, 1]])
    match = "Labels must be finite. Received: nan in row 1"
    bad_values.assert_refused(classifier.fit, rows, labels, verbose=0, match=match)


@pytest.mark.parametrize("x", [None, 3, [], "", (), {}, np.zeros((0,), object)], ids=repr)
def test_no_texts_at_all(lm, x):
    with pytest.raises(ValueError, match="[Ss]ample|missing|texts"):
        lm.fit(x, verbose=0)


@pytest.fixture(scope="module")
def forecaster():
    forecaster = Mamba2Forecaster(1, hidden_dim=8, state_dim=4, head_dim=4, num_layers=1)
    forecaster.compile(optimizer="sgd", loss="mse")
    return forecaster


VALUES, TARGETS = np.arange(30.0).reshape(3, 10, 1), np.ones((3, 1, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"x": None},
        {"x": []},
        {"x": 3},
        {"x": "a"},
        {"x": VALUES[:0]},
        {"x": VALUES[0]},
        {"x": VALUES * NAN},
        {"x": VALUES.astype(str)},
        {"x": {}},
        {"x": {"values": VALUES}},
        {"x": {"values": VALUES, "mask": np.zeros((3, 10))}},
        {"x": {"values": VALUES, "mask": np.ones((3, 9))}},
        {"y": None},
        {"sample_weight": np.array([1, -1, 1])},
        {"sample_weight": np.array([1, NAN, 1])},
        {"sample_weight": np.array([1, INF, 1])},
    ],
    ids=lambda change: str(change)[:40],
)
def test_data_that_a_forecaster_cannot_learn_from(forecaster, change):
    data = {"x": VALUES, "y": TARGETS, **change}
    pattern = "[Ss]ample|shape|observed|Values|Targets|mask|sample_weight"
    for call in (forecaster.fit, forecaster.evaluate):
        bad_values.assert_refused(call, **data, verbose=0, match=pattern)


@pytest.mark.parametrize("n", NO_SIZE, ids=repr)
def test_how_often_a_session_is_forked(lm, n):
    session = keras_mamba2.Mamba2Session(lm, "a", lm.backbone.initial_state(1))
    bad_values.assert_argument_refused(session.fork, "n", n=n)
