"""Sizes of models that are never built, beside those of models that are."""

import pytest

import keras_mamba2
from keras_mamba2.conversion import constructor_arguments
from keras_mamba2.conversion.sizes import parameter_count
from keras_mamba2.conversion.sizes import state_bytes
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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_groups": 2, "use_bias": True},
        {"tie_word_embeddings": False, "use_conv_bias": False},
        {"expansion": 1.5, "conv_kernel_size": 3},
    ],
)
def test_counts_are_those_of_the_built_model(changes):
    arguments = {
        "vocabulary_size": 33,
        "num_layers": 2,
        "hidden_dim": 16,
        "head_dim": 4,
        "state_dim": 8,
        **changes,
    }
    backbone = keras_mamba2.Mamba2Backbone(**arguments)
    assert parameter_count(arguments) == backbone.count_params()
    assert state_bytes(arguments) == backbone.initial_state(1).nbytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_presets_are_the_published_models(name):
    files = Preset(name)
    assert parameter_count(constructor_arguments(files.config)) == PUBLISHED[name]
    metadata = keras_mamba2.Mamba2Backbone.presets[name]["metadata"]
    assert metadata["params"] == PUBLISHED[name]
    card = (named_presets()[name] / "README.md").read_text()
    assert f"{PUBLISHED[name]:,}" in card
