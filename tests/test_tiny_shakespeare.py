"""The preset that ships with the package."""

import math
import re

import pytest

import keras_mamba2
from keras_mamba2.preset_files import named_presets
from tests.conftest import SHARED_DATA


@pytest.fixture(scope="module")
def lm():
    return keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")


def test_it_is_small_and_knows_its_plays(lm):
    assert lm.count_params() <= 4e6
    lm.compile(sampler="greedy")
    text = lm.generate("ROMEO:\n", max_new_tokens=200)
    words = set(["the", "and", "to", "of", "you", "my", "that", "is", "with", "not", "be", "your"])
    assert len(words & set(text.lower().split())) >= 4


def loss_of_card():
    card = (named_presets()["mamba2_tiny_shakespeare"] / "README.md").read_text()
    return float(re.search(r"\*\*(\d\.\d+) nats a character\*\*", card).group(1))


def test_its_loss_is_what_its_card_says(lm):
    """On the whole validation text, the last tenth, with the state carried from end to end."""
    path = SHARED_DATA / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip("the tiny Shakespeare text of the shared data is absent")
    text = path.read_text()
    loss = math.log(lm.perplexity(text[int(0.9 * len(text)) :]))
    assert loss == pytest.approx(loss_of_card(), abs=2e-4)
