"""Names of inputs: KerasHub's, transformers', and what is wrong with others."""

import functools

import numpy as np
import pytest

from keras_mamba2 import Mamba2CausalLM

IDS, MASK = np.array([[3, 1, 4, 1, 5]]), np.array([[1, 1, 1, 1, 0]])
KERAS = {"token_ids": IDS, "padding_mask": MASK}
TRANSFORMERS = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(scope="module")
def lm(preset_folder):
    lm = Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
    lm.compile(sampler="greedy", optimizer="sgd", weighted_metrics=[])
    return lm


def test_transformers_names_do_everywhere(lm):
    np.testing.assert_array_equal(lm(TRANSFORMERS), lm(KERAS))
    np.testing.assert_array_equal(lm.backbone(TRANSFORMERS), lm.backbone(KERAS))
    np.testing.assert_array_equal(lm.predict(TRANSFORMERS, verbose=0), lm.predict(KERAS, verbose=0))
    options = {"stop_token_ids": None, "max_new_tokens": 3}
    found, expected = (lm.generate(x, **options)["token_ids"] for x in (TRANSFORMERS, KERAS))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(lm.prefill(TRANSFORMERS).digest, lm.prefill(KERAS).digest)
    losses = [lm.evaluate(x, IDS, verbose=0) for x in (TRANSFORMERS, KERAS)]
    assert losses[0] == losses[1]
    lm.fit(TRANSFORMERS, IDS, verbose=0)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({**KERAS, "input_ids": IDS}, "named twice.*'input_ids'"),
        ({**KERAS, "position_ids": IDS}, "no input 'position_ids'"),
        ({"token_ids": IDS}, "`padding_mask` is missing"),
        ({"padding_mask": MASK}, "`token_ids` is missing"),
        (IDS, "must be a dict"),
        ([IDS, MASK], "must be a dict"),
    ],
)
def test_what_is_wrong_is_named(lm, inputs, message):
    generate = functools.partial(lm.generate, stop_token_ids=None)
    for call in (lm, lm.backbone):
        with pytest.raises(ValueError, match=message):
            call(inputs)
    if isinstance(inputs, dict):
        for call in (generate, lm.prefill, lm.predict, lambda x: lm.fit(x, IDS)):
            with pytest.raises(ValueError, match=message):
                call(inputs)


def test_numbers_of_documents_are_no_mask(lm):
    packed = {"token_ids": IDS, "padding_mask": np.array([[1, 1, 2, 2, 0]])}
    for call in (lm.predict, lambda x: lm.fit(x, IDS), lambda x: lm.evaluate(x, IDS)):
        with pytest.raises(ValueError, match="numbers of documents.*`segment_ids`.*2 in row 0"):
            call(packed)
