import numpy as np
from keras_hub.src.tests.test_case import TestCase

from keras_mamba2 import Mamba2CausalLMPreprocessor
from keras_mamba2 import Mamba2Tokenizer
from keras_mamba2.models.mamba2_tokenizer import byte_vocabulary


class Mamba2CausalLMPreprocessorTest(TestCase):
    def setUp(self):
        self.tokenizer = Mamba2Tokenizer(byte_vocabulary("<|endoftext|>"), [])
        self.init_kwargs = {"tokenizer": self.tokenizer, "sequence_length": 6}

    def test_preprocessor_basics(self):
        self.run_preprocessor_test(
            cls=Mamba2CausalLMPreprocessor,
            init_kwargs=self.init_kwargs,
            input_data=["abc"],
            expected_output=(
                {
                    "token_ids": [[97, 98, 99, 256, 256, 256]],
                    "padding_mask": [[1, 1, 1, 1, 0, 0]],
                },
                [[98, 99, 256, 256, 256, 256]],
                [[1, 1, 1, 0, 0, 0]],
            ),
        )

    def test_with_start_token(self):
        preprocessor = Mamba2CausalLMPreprocessor(**self.init_kwargs, add_start_token=True)
        x, _, _ = preprocessor(["abc"])
        self.assertAllEqual(x["token_ids"], [[256, 97, 98, 99, 256, 256]])
        x = preprocessor.generate_preprocess(["abc"])
        self.assertAllEqual(x["token_ids"], [[256, 97, 98, 99, 256, 256]])
        self.assertAllEqual(x["padding_mask"], [[1, 1, 1, 1, 0, 0]])

    def test_generate_preprocess_without_start_token(self):
        preprocessor = Mamba2CausalLMPreprocessor(**self.init_kwargs)
        x = preprocessor.generate_preprocess("abc")
        self.assertAllEqual(x["token_ids"], [97, 98, 99, 256, 256, 256])
        self.assertAllEqual(x["padding_mask"], [1, 1, 1, 0, 0, 0])

    def test_postprocess_reads_the_mask_and_not_the_ids(self):
        preprocessor = Mamba2CausalLMPreprocessor(**self.init_kwargs)
        text = preprocessor.generate_postprocess(
            {
                "token_ids": np.array([[104, 105, 256, 106, 107, 108]]),
                "padding_mask": np.array([[1, 1, 1, 0, 0, 0]]),
            }
        )
        self.assertAllEqual(text, ["hi"])
