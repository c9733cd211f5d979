import unicodedata

import numpy as np
import pytest
import tensorflow as tf
import tokenizers
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras_hub.src.tests.test_case import TestCase

from keras_mamba2 import Mamba2Tokenizer
from keras_mamba2.models.mamba2_tokenizer import byte_vocabulary
from tests.conftest import SHARED_DATA

TEXTS = [
    "To be, or not to be",
    "def f(x):\n    return x**2\n\n\n        # deep",
    "a\r\nb\tc\x00\x07",
    "naïve café, e\u0301, \u2126",
    "日本語 ありがとう 🤷🏽‍♀️",
    "<|endoftext|> inside <|padding|>",
    "",
    "   ",
]


def small_vocabulary():
    merges = ["a i", "p l", "n e", "ai r", "Ġ air", "pl a", "pla ne"]
    tokens = [*byte_vocabulary(), *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    return {token: id for id, token in enumerate(tokens)}, merges


class Mamba2TokenizerTest(TestCase):
    def setUp(self):
        self.vocabulary, self.merges = small_vocabulary()
        self.init_kwargs = {"vocabulary": self.vocabulary, "merges": self.merges}

    def test_tokenizer_basics(self):
        ids = [self.vocabulary[token] for token in ("Ġair", "plane", "Ġ", "t")]
        self.run_preprocessing_layer_test(
            cls=Mamba2Tokenizer,
            init_kwargs=self.init_kwargs,
            input_data=[" airplane t", " airplane t"],
            expected_output=[ids, ids],
        )

    def test_same_ids_eagerly_and_in_tf_data(self):
        tokenizer = Mamba2Tokenizer(**self.init_kwargs)
        eager = tokenizer(TEXTS)
        dataset = tf.data.Dataset.from_tensor_slices(TEXTS)
        assert [ids.numpy().tolist() for ids in dataset.map(tokenizer)] == eager
        [batch] = dataset.batch(len(TEXTS)).map(tokenizer)
        assert batch.to_list() == eager
        [texts] = dataset.batch(len(TEXTS)).map(tokenizer).map(tokenizer.detokenize)
        assert [text.decode() for text in texts.numpy()] == tokenizer.detokenize(eager)

    def test_special_tokens_are_not_split(self):
        tokenizer = Mamba2Tokenizer(**self.init_kwargs)
        assert tokenizer("a<|endoftext|>").tolist() == [97, tokenizer.end_token_id]
        assert tokenizer.id_to_token(tokenizer.end_token_id) == "<|endoftext|>"

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "together.*vocabulary alone"):
            Mamba2Tokenizer(vocabulary=self.vocabulary)
        with self.assertRaisesRegex(ValueError, "merge rule.*'x y z'"):
            Mamba2Tokenizer(vocabulary=self.vocabulary, merges=["x y z"])
        with self.assertRaisesRegex(ValueError, "<s>"):
            Mamba2Tokenizer(**self.init_kwargs, start_token="<s>")
        with self.assertRaisesRegex(ValueError, "nowhere.json.*no such file"):
            Mamba2Tokenizer(tokenizer="nowhere.json")
        with self.assertRaisesRegex(ValueError, "dtype='float32'"):
            Mamba2Tokenizer(**self.init_kwargs, dtype="float32")
        with self.assertRaisesRegex(ValueError, "No vocabulary"):
            Mamba2Tokenizer()("a")
        tokenizer = Mamba2Tokenizer(**self.init_kwargs)
        with self.assertRaisesRegex(ValueError, "id=9999"):
            tokenizer.id_to_token(9999)
        with self.assertRaisesRegex(ValueError, "'zzz'"):
            tokenizer.token_to_id("zzz")


@settings(deadline=None, derandomize=True)
@given(text=st.text())
def test_bytes_come_back_up_to_nfc(byte_tokenizer, text):
    ids = byte_tokenizer(text)
    assert byte_tokenizer.detokenize(ids) == unicodedata.normalize("NFC", text)
    np.testing.assert_array_equal(ids, list(unicodedata.normalize("NFC", text).encode()))


def test_save_and_load(tmp_path):
    vocabulary, merges = small_vocabulary()
    tokenizer = Mamba2Tokenizer(vocabulary, merges)
    tokenizer.save_assets(tmp_path)
    loaded = Mamba2Tokenizer.from_config(tokenizer.get_config())
    loaded.load_assets(tmp_path)
    assert loaded(TEXTS) == tokenizer(TEXTS)
    assert loaded.end_token_id == tokenizer.end_token_id


@pytest.fixture(scope="module")
def gpt_neox():
    path = SHARED_DATA / "gpt-neox-20b" / "tokenizer.json"
    if not path.exists():
        pytest.skip("the GPT-NeoX tokenizer of the shared data is absent")
    return tokenizers.Tokenizer.from_file(str(path)), path


def test_gpt_neox_from_its_file(gpt_neox):
    engine, path = gpt_neox
    tokenizer = Mamba2Tokenizer(tokenizer=path)
    assert tokenizer(TEXTS) == [encoding.ids for encoding in engine.encode_batch(TEXTS)]
    assert (tokenizer.end_token_id, tokenizer.vocabulary_size()) == (0, 50277)


def test_gpt_neox_from_vocabulary_and_merges(gpt_neox):
    import json

    engine, path = gpt_neox
    model = json.loads(path.read_text("utf-8"))["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    tokenizer = Mamba2Tokenizer(engine.get_vocab(with_added_tokens=True), merges)

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(text=st.text() | st.text(alphabet=" \n\tab<|>endoftx"))
    def same_ids(text):
        assert tokenizer(text).tolist() == engine.encode(text).ids

    same_ids()
    assert tokenizer(TEXTS) == [encoding.ids for encoding in engine.encode_batch(TEXTS)]
