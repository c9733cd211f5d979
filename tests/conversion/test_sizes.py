"""The sizes of the named presets."""

import pytest

import keras_mamba2
from keras_mamba2.conversion import constructor_arguments
from keras_mamba2.conversion.deferred import deferred_initialization
from keras_mamba2.preset_files import Preset
from keras_mamba2.preset_files import named_presets

# As published with the checkpoints.
PUBLISHED = {
    "mamba2_130m_en": 128_989_632,
    "mamba2_370m_en": 368_346_624,
    "mamba2_780m_en": 780_161_280,
    "mamba2_1.3b_en": 1_343_757_312,
    "mamba2_2.7b_en": 2_702_599_680,
    "mamba2_codestral_7b": 7_285_403_648,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_presets_are_the_published_models(name):
    with deferred_initialization():
        backbone = keras_mamba2.Mamba2Backbone(**constructor_arguments(Preset(name).config))
    assert backbone.count_params() == PUBLISHED[name]
    metadata = keras_mamba2.Mamba2Backbone.presets[name]["metadata"]
    assert metadata["params"] == PUBLISHED[name]
    card = (named_presets()[name] / "README.md").read_text()
    assert f"{PUBLISHED[name]:,}" in card
