"""The preset that ships with the package."""

import math
import re

import keras_hub
import pytest

import keras_mamba2
from keras_mamba2.preset_files import named_presets
from tests.conftest import SHARED_DATA


@pytest.fixture(scope="module")
def plays():
    path = SHARED_DATA / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip("the tiny Shakespeare text of the shared data is absent")
    return path.read_text()


@pytest.fixture(scope="module")
def lm():
    return keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")


def test_it_is_small_and_knows_its_plays(lm):
    assert lm.count_params() <= 3e6
    lm.compile(sampler="greedy")
    text = lm.generate("ROMEO:\n", max_new_tokens=200)
    words = set(["the", "and", "to", "of", "you", "my", "that", "is", "with", "not", "be", "your"])
    assert len(words & set(text.lower().split())) >= 4


@pytest.mark.slow
def test_its_speakers_are_those_of_the_plays(lm, plays):
    """In 50 pages of 1,000 characters, sampled anew with another seed than the card's."""
    speaker = re.compile(r"(?<=\n\n)[A-Z][A-Za-z ]*(?=:\n)")
    known = set(speaker.findall("\n\n" + plays))
    lm.compile(sampler=keras_hub.samplers.TopPSampler(p=0.95, temperature=0.8, seed=7))
    pages = lm.generate(["ROMEO:\n"] * 50, max_new_tokens=1000, stop_token_ids=None)
    speakers = [name for page in pages for name in speaker.findall(page)]
    assert len(speakers) > 200
    assert sum(name in known for name in speakers) >= 0.9 * len(speakers)


def loss_of_card():
    card = (named_presets()["mamba2_tiny_shakespeare"] / "README.md").read_text()
    return float(re.search(r"\*\*(\d\.\d+) nats a character\*\*", card).group(1))


@pytest.mark.slow
def test_its_loss_is_what_its_card_says(lm, plays):
    """On the whole validation text, the last tenth, with the state carried from end to end."""
    loss = math.log(lm.perplexity(plays[int(0.9 * len(plays)) :]))
    assert loss == pytest.approx(loss_of_card(), abs=2e-4)
