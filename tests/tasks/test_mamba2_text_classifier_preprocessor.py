import numpy as np
import pytest
from keras_hub.src.tests.test_case import TestCase

from keras_mamba2 import Mamba2TextClassifierPreprocessor
from keras_mamba2 import Mamba2Tokenizer
from keras_mamba2.models.mamba2_tokenizer import byte_vocabulary

A, B, C, D, END = 97, 98, 99, 100, 256


class Mamba2TextClassifierPreprocessorTest(TestCase):
    def setUp(self):
        self.tokenizer = Mamba2Tokenizer(byte_vocabulary("<|endoftext|>"), [])
        self.init_kwargs = {"tokenizer": self.tokenizer, "sequence_length": 6}

    def test_preprocessor_basics(self):
        self.run_preprocessing_layer_test(
            cls=Mamba2TextClassifierPreprocessor,
            init_kwargs=self.init_kwargs,
            input_data=(["abc", "abcdefgh", ""], [1, 0, 2], [1.0, 0.5, 1.0]),
            expected_output=(
                {
                    "token_ids": [[A, B, C, END, END, END], [A, B, C, D, 101, END], [END] * 6],
                    # The end token is real, and has the id of padding.
                    "padding_mask": [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]],
                },
                [1, 0, 2],
                [1.0, 0.5, 1.0],
            ),
        )

    def test_start_and_end_tokens_are_options(self):
        for start, end, expected in (
            (True, True, [END, A, B, END]),
            (True, False, [END, A, B]),
            (False, False, [A, B]),
        ):
            preprocessor = Mamba2TextClassifierPreprocessor(
                **self.init_kwargs, add_start_token=start, add_end_token=end
            )
            preprocessor = Mamba2TextClassifierPreprocessor.from_config(preprocessor.get_config())
            preprocessor.tokenizer.set_vocabulary_and_merges(byte_vocabulary("<|endoftext|>"), [])
            x = preprocessor(["ab"])
            real = np.array(x["padding_mask"][0]).astype(bool)
            self.assertAllEqual(np.array(x["token_ids"][0])[real], expected)

    def test_segments_share_the_row(self):
        preprocessor = Mamba2TextClassifierPreprocessor(**self.init_kwargs)
        x, _ = preprocessor((["aaaa"], ["b"]), [0])
        self.assertAllEqual(x["token_ids"], [[A, A, A, END, B, END]])

    def test_a_tokenizer_without_special_tokens(self):
        tokenizer = Mamba2Tokenizer(byte_vocabulary(), [], start_token=None, end_token=None)
        x = Mamba2TextClassifierPreprocessor(tokenizer, 3)(["ab", "abcd"])
        self.assertAllEqual(x["token_ids"], [[A, B, 0], [A, B, C]])
        self.assertAllEqual(x["padding_mask"], [[1, 1, 0], [1, 1, 1]])


def test_bad_lengths_are_named(byte_tokenizer):
    with pytest.raises(ValueError, match="sequence_length=0"):
        Mamba2TextClassifierPreprocessor(byte_tokenizer, sequence_length=0)
