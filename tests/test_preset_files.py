"""Presets by name and folder: what is missing, truncated or foreign is named before loading."""

import functools
import json
import shutil

import h5py
import huggingface_hub
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2.preset_files import Preset
from keras_mamba2.preset_files import named_presets
from keras_mamba2.preset_files import read_sources
from tests.training import runs


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


# `pytest.warns` repeats what Keras warns of, as from elsewhere.
ignore_array = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SKIPPED = "Skipping variable loading for optimizer"  # what Keras says


def trained_lm(optimizer, folder) -> keras_mamba2.Mamba2CausalLM:
    """Its first weight is NaN in the optimizer, and sound in the model."""
    lm = runs.make_lm(optimizer)
    lm.fit(runs.TEXTS, verbose=0)
    lm.save_weights(folder / "a.weights.h5")
    with h5py.File(folder / "a.weights.h5", "r+") as stored:
        stored["optimizer/vars/2"][0] = np.nan
    return lm


@ignore_array
def test_the_state_of_another_optimizer_is_left_out(tmp_path):
    # With a schedule the first momentum has the place of a learning rate.
    trained = trained_lm(keras_mamba2.training.adamw_recipe(1e-3, steps=100), tmp_path)
    fresh = runs.make_lm("sgd")
    state = [variable.numpy() for variable in fresh.optimizer.variables]
    with pytest.warns(UserWarning, match=SKIPPED):
        fresh.load_weights(tmp_path / "a.weights.h5")
    assert all(map(np.array_equal, trained.get_weights(), fresh.get_weights()))
    assert state == [variable.numpy() for variable in fresh.optimizer.variables]


def test_the_state_of_the_same_optimizer_is_restored(tmp_path):
    trained, fresh = trained_lm("adam", tmp_path), runs.make_lm("adam")
    fresh.load_weights(tmp_path / "a.weights.h5")
    of_trained, of_fresh = (
        [variable.numpy() for variable in lm.optimizer.variables] for lm in (trained, fresh)
    )
    assert np.isnan(of_fresh[2][0]).all()
    of_trained[2][0] = np.nan
    assert all(map(functools.partial(np.array_equal, equal_nan=True), of_trained, of_fresh))


@ignore_array
def test_a_trained_classifier_comes_back(preset_folder, tmp_path):
    load = keras_mamba2.Mamba2TextClassifier.from_preset
    classifier = load(preset_folder, num_classes=2)
    classifier.compile(keras_mamba2.training.adamw_recipe(1e-3, steps=100))
    classifier.fit(["a", "b"], [0, 1], verbose=0)
    classifier.save_to_preset(tmp_path / "classifier")
    with pytest.warns(UserWarning, match=SKIPPED):
        again = load(tmp_path / "classifier")
    assert all(map(np.array_equal, classifier.get_weights(), again.get_weights()))


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


@pytest.mark.parametrize("name", named_presets())
def test_cards_have_the_metadata_of_the_hub(name):
    folder = named_presets()[name]
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.text.lstrip().startswith(f"# {name}\n")
    metadata = card.data.to_dict()
    metadata.pop("language", None)
    expected = {
        "library_name": "keras-hub",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["mamba2", "keras_mamba2"],
    }
    if (folder / "sources.json").exists():
        sources = json.loads((folder / "sources.json").read_text())
        expected["base_model"] = sources["weights"].removeprefix("hf://")
        if sources["license"] != "Apache-2.0":  # one that the hub has no id for
            expected["license"] = "other"
            expected["license_name"] = sources["license"].lower().replace(" ", "-")
            link = metadata.pop("license_link")
            assert f"| licence | [{sources['license']}]({link}) |" in card.text
        else:
            assert "| licence | Apache-2.0 |" in card.text
        for key in ("weights", "tokenizer"):
            repository = sources[key].removeprefix("hf://")
            assert f"| {key} from | <https://huggingface.co/{repository}> |" in card.text
        description = json.loads((folder / "metadata.json").read_text())["description"]
        assert description in " ".join(card.text.split())
        assert f'from_preset("{name}"' in card.text
    assert metadata == expected


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sources_with(folder, **changes):
    handles = {"weights": "hf://user/weights", "tokenizer": "hf://user/tokenizer"}
    (folder / "sources.json").write_text(json.dumps({**handles, **changes}))
    return read_sources(folder / "sources.json")


def test_sources_are_pinned_to_commits(tmp_path):
    assert sources_with(tmp_path)["weights"] == "hf://user/weights"
    sources = sources_with(tmp_path, revision={"weights": COMMIT})
    assert sources == {
        "weights": f"hf://user/weights@{COMMIT}",
        "tokenizer": "hf://user/tokenizer",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": COMMIT}, "maps sources to commits.*Received: revision='0123"),
        ({"revision": {"weights": "main"}}, "40 hexadecimal digits. Received: weights='main'"),
        ({"revision": {"weights": COMMIT[:7]}}, "40 hexadecimal digits. Received: weights='0123"),
        ({"revision": {"tokenizer": None}}, "40 hexadecimal digits. Received: tokenizer=None"),
        ({"revision": {"license": COMMIT}}, "`weights` and `tokenizer`.* Received: license=None"),
        (
            {"weights": "hf://user/weights@v1", "revision": {"weights": COMMIT}},
            "no revision of their own. Received: weights='hf://user/weights@v1'",
        ),
    ],
)
def test_a_wrong_pin_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"sources.json: .*{message}"):
        sources_with(tmp_path, **changes)
