"""Packed rows: every document whole, next to no padding, and `fit` on every kind of text input."""

import grain
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_mamba2 import Mamba2Backbone
from keras_mamba2 import Mamba2CausalLM
from keras_mamba2 import Mamba2CausalLMPreprocessor
from keras_mamba2.tasks.packing import best_fit
from keras_mamba2.tasks.packing import pack

TEXTS = ["hello", "hi you", "a", "", "the quick brown fox jumps", "abc", "it was late"]
END = 256


def documents_of(x, y, sample_weight):
    """What the rows hold, document by document, with the target after each last input."""
    np.testing.assert_array_equal(x["padding_mask"], sample_weight)
    for ids, numbers, targets, weights in zip(
        x["token_ids"], x["segment_ids"], y, sample_weight, strict=True
    ):
        np.testing.assert_array_equal(np.asarray(numbers) > 0, weights)
        for number in range(1, np.max(numbers) + 1):
            here = np.flatnonzero(np.asarray(numbers) == number)
            assert len(here) == here[-1] - here[0] + 1
            inputs, following = np.asarray(ids)[here], np.asarray(targets)[here]
            np.testing.assert_array_equal(inputs[1:], following[:-1])
            yield [*inputs.tolist(), int(following[-1])]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12), st.integers(1, 15))
def test_every_document_is_there_once_and_whole(documents, size):
    x, y, sample_weight = pack(documents, size)
    pieces = [d[i : i + size + 1] for d in documents for i in range(0, len(d) - 1, size)]
    assert sorted(documents_of(x, y, sample_weight)) == sorted(pieces)
    assert y.shape == x["token_ids"].shape == sample_weight.shape
    assert y.shape[1] == size


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_no_two_rows_would_fit_in_one(lengths):
    totals = sorted(sum(lengths[i] for i in row) for row in best_fit(lengths, 20))
    assert sum(totals[:2]) > 20 or len(totals) < 2


def test_rows_of_equal_documents_are_full():
    _, _, sample_weight = pack([range(9)] * 8, 16)  # 8 positions each
    assert sample_weight.all()
    assert len(sample_weight) == 4


@pytest.fixture(scope="module")
def preprocessor(byte_tokenizer):
    return Mamba2CausalLMPreprocessor(byte_tokenizer, sequence_length=16, packing=True)


@pytest.fixture(scope="module")
def lm(preprocessor):
    backbone = Mamba2Backbone(257, 1, 8, state_dim=2, head_dim=4, chunk_size=8)
    lm = Mamba2CausalLM(backbone, preprocessor)
    lm.compile(optimizer="sgd")
    return lm


def as_tokens(text):
    tokens = [*text.encode(), END]
    return [tokens[i : i + 17] for i in range(0, len(tokens) - 1, 16)]


def test_long_texts_are_cut_and_empty_ones_left_out(preprocessor):
    expected = sorted(piece for text in TEXTS for piece in as_tokens(text))
    assert sorted(documents_of(*preprocessor(TEXTS))) == expected
    assert sorted(documents_of(*preprocessor(TEXTS[0]))) == as_tokens(TEXTS[0])
    _, y, _ = preprocessor(TEXTS, sequence_length=5)
    assert y.shape[1] == 5


DATASETS = {
    "tf.data": lambda texts: tf.data.Dataset.from_tensor_slices(texts).batch(3),
    "grain map": lambda texts: grain.MapDataset.source(texts).batch(3),
    "grain iter": lambda texts: grain.MapDataset.source(texts).to_iter_dataset().batch(3),
    "tuples": lambda texts: tf.data.Dataset.from_tensor_slices((texts,)).batch(3),
}


@pytest.mark.parametrize("kind", ["tf.data", "grain map", "grain iter"])
def test_mapped_over_a_dataset(preprocessor, kind):
    [*batches] = DATASETS[kind](TEXTS).map(preprocessor)
    found = [document for batch in batches for document in documents_of(*batch)]
    assert sorted(found) == sorted(piece for text in TEXTS for piece in as_tokens(text))


# Keras says it of every dataset whose length it cannot ask for.
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.slow
def test_fit_and_evaluate_see_batches_of_one_size(lm, kind):
    texts = TEXTS * 6
    expected = lm.evaluate(texts, batch_size=3, verbose=0)
    np.testing.assert_allclose(lm.evaluate(DATASETS[kind](texts), verbose=0), expected, rtol=1e-5)
    history = lm.fit(DATASETS[kind](texts), validation_data=DATASETS[kind](texts), verbose=0)
    assert np.isfinite(history.history["val_loss"]).all()


def test_fit_takes_texts_and_rows_alike(lm):
    kwargs = {"batch_size": 2, "verbose": 0}
    expected = lm.evaluate(TEXTS, **kwargs)
    rows = lm.preprocessor(TEXTS)
    for x in (np.array(TEXTS), tuple(rows)):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(x)
        assert lm.evaluate(x, y, sample_weight=sample_weight, **kwargs) == expected
    history = lm.fit(TEXTS, validation_data=TEXTS, **kwargs).history
    assert history["val_loss"][0] == lm.evaluate(TEXTS, return_dict=True, **kwargs)["loss"]
    x, y, sample_weight = rows
    lm.fit(x, y, sample_weight=sample_weight, validation_split=0.5, **kwargs)


def test_nothing_to_train_on_is_refused(lm):
    with pytest.raises(ValueError, match="No text has two tokens.*Received 2 texts"):
        lm.fit(["", ""])
    with pytest.raises(ValueError, match="There is no sample in the data"):
        lm.fit([])
    with pytest.raises(ValueError, match="The dataset is empty"):
        lm.fit(DATASETS["grain map"]([]))


def test_packing_is_part_of_a_preset(lm, tmp_path):
    lm.save_to_preset(tmp_path)
    loaded = Mamba2CausalLM.from_preset(str(tmp_path)).preprocessor
    np.testing.assert_array_equal(loaded(TEXTS)[1], lm.preprocessor(TEXTS)[1])
