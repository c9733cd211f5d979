"""Presets by name and folder: what is missing, truncated or foreign is named before loading."""

import json
import shutil

import h5py
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2.preset_files import Preset
from keras_mamba2.preset_files import named_presets


@pytest.fixture
def copy(preset_folder, tmp_path):
    return shutil.copytree(preset_folder, tmp_path / "copy")


def load(folder):
    return keras_mamba2.Mamba2CausalLM.from_preset(folder)


@pytest.mark.parametrize(
    "file", ["config.json", "model.weights.h5", "tokenizer.json", "assets/tokenizer/tokenizer.json"]
)
def test_a_missing_file_is_named(copy, file):
    (copy / file).unlink()
    with pytest.raises(ValueError, match=f"{copy / file} is missing"):
        load(copy)


@pytest.mark.parametrize(
    "file", ["config.json", "model.weights.h5", "tokenizer.json", "assets/tokenizer/tokenizer.json"]
)
def test_a_truncated_file_is_named(copy, file):
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{copy / file} is truncated"):
        load(copy)


def test_a_foreign_configuration_is_named(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"config.json: Unknown `model_type`.*'llama'"):
        load(copy)
    (copy / "config.json").write_text(json.dumps({"registered_name": "keras_hub>GemmaBackbone"}))
    with pytest.raises(ValueError, match=r"config.json is not the configuration of a Mamba2"):
        load(copy)


def test_a_foreign_weights_file_is_named(copy):
    (copy / "model.weights.h5").write_bytes(b"PK\x03\x04 not weights")
    with pytest.raises(ValueError, match=r"model.weights.h5 is not a weights file"):
        load(copy)


def test_what_is_not_read_may_be_missing(copy):
    (copy / "model.weights.h5").unlink()
    keras_mamba2.Mamba2Backbone.from_preset(copy, load_weights=False)
    keras_mamba2.Mamba2Tokenizer.from_preset(copy)


@pytest.fixture
def backbone(preset_folder):
    return keras_mamba2.Mamba2Backbone.from_preset(preset_folder)


def assert_refused_and_unchanged(backbone, file, message):
    before = backbone.get_weights()
    with pytest.raises(ValueError, match=message):
        backbone.load_weights(file)
    assert all(map(np.array_equal, before, backbone.get_weights()))


def test_a_file_is_loaded_whole_or_not_at_all(backbone, small_backbone_arguments, tmp_path):
    file = tmp_path / "a.weights.h5"
    other = keras_mamba2.Mamba2Backbone(**small_backbone_arguments)
    other.save_weights(file)
    backbone.load_weights(file)
    assert all(map(np.array_equal, other.get_weights(), backbone.get_weights()))
    with h5py.File(file, "r+") as stored:
        stored["layers/gated_rms_normalization/vars/0"][3] = np.nan
        stored["layers/reversible_embedding/vars/0"][:] = 5
    assert_refused_and_unchanged(backbone, file, r"vars/0 \(1 NaN of 32 in float32\)")


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_weights_of_another_number_of_layers(
    num_layers, backbone, preset_folder, small_backbone_arguments, tmp_path
):
    arguments = {**small_backbone_arguments, "num_layers": num_layers}
    keras_mamba2.Mamba2Backbone(**arguments).save_weights(tmp_path / "a.weights.h5")
    assert_refused_and_unchanged(backbone, tmp_path / "a.weights.h5", "not those of the model")
    with pytest.raises(ValueError, match="not those of the model"):
        keras_mamba2.Mamba2Backbone.from_preset(preset_folder, num_layers=num_layers)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"Known names: .*Did you mean 'mamba2_tiny_shakespeare'"):
        Preset("mamba2_tiny_shakespear")


def test_named_presets_are_listed():
    assert "mamba2_tiny_shakespeare" in named_presets()
    assert set(named_presets()) <= set(keras_mamba2.Mamba2Backbone.presets)
