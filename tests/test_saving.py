"""`save_to_preset` and `save` replace what was there as a whole, and nothing of others."""

import fnmatch
import json

import keras
import keras_hub
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2 import saving
from tests.training import runs


@pytest.fixture(scope="module")
def lm():
    return runs.make_lm()


@pytest.fixture
def changed(lm):
    """The same model with other weights, for the time of a test."""
    before = lm.get_weights()
    lm.set_weights([weight + 1 for weight in before])
    yield lm
    lm.set_weights(before)


@pytest.fixture
def saved(lm, tmp_path):
    lm.save_to_preset(tmp_path / "saved")
    return tmp_path / "saved"


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def without_date(contents):
    return {name: content for name, content in contents.items() if name != "metadata.json"}


def parts_of(lm):
    return [lm.backbone, lm.preprocessor.tokenizer, lm.preprocessor, lm]


@pytest.mark.parametrize("part", range(4))
def test_the_patterns_are_those_of_what_is_written(lm, tmp_path, part):
    part = parts_of(lm)[part]
    part.save_to_preset(tmp_path / "new")
    written = files(tmp_path / "new")
    for name in written:
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in part.preset_files), name
    assert written


def test_parts_are_saved_one_by_one(lm, saved, tmp_path):
    """As KerasHub allows; a part leaves the files of the others as they are."""
    for part in parts_of(lm):
        part.save_to_preset(tmp_path / "parts")
    assert without_date(files(tmp_path / "parts")) == without_date(files(saved))
    before = files(saved)
    lm.preprocessor.save_to_preset(saved)
    lm.preprocessor.tokenizer.save_to_preset(saved)
    assert files(saved) == before


def test_shards_of_before_go(lm, saved):
    lm.backbone.save_to_preset(saved, max_shard_size=8e-6)
    assert len(list(saved.glob("model_*.weights.h5"))) > 1
    assert not (saved / "model.weights.h5").exists()
    assert (saved / "task.json").exists()
    again = keras_mamba2.Mamba2CausalLM.from_preset(saved)
    assert all(map(np.array_equal, again.get_weights(), lm.get_weights()))
    lm.save_to_preset(saved)
    assert not list(saved.glob("model_*"))
    assert not (saved / "model.weights.json").exists()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_between_weights_and_tokenizer_leaves_the_old(changed, saved, error, monkeypatch):
    before = files(saved)

    def fail(*args):
        raise error

    monkeypatch.setattr(type(changed.preprocessor.tokenizer), "save_assets", fail)
    with pytest.raises(type(error)):
        changed.save_to_preset(saved)
    assert files(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    monkeypatch.undo()
    changed.save_to_preset(saved)
    again = keras_mamba2.Mamba2CausalLM.from_preset(saved)
    assert all(map(np.array_equal, again.get_weights(), changed.get_weights()))


def test_a_classifier_replaces_a_language_model_and_back(lm, saved):
    classifier = keras_mamba2.Mamba2TextClassifier(lm.backbone, num_classes=2, preprocessor=None)
    classifier.save_to_preset(saved)
    assert "task.weights.h5" in files(saved)
    assert "tokenizer.json" not in files(saved)
    lm.save_to_preset(saved)
    assert "task.weights.h5" not in files(saved)
    keras_hub.models.CausalLM.from_preset(str(saved))


def test_a_card_stays_and_foreign_files_are_refused(lm, saved):
    (saved / "README.md").write_text("mine")
    lm.save_to_preset(saved)
    assert (saved / "README.md").read_text() == "mine"
    (saved / "notes").mkdir()
    (saved / "notes" / "thesis.tex").write_text("years")
    before = files(saved)
    for part in parts_of(lm):
        with pytest.raises(ValueError, match="notes/thesis.tex.*another folder"):
            part.save_to_preset(saved)
    assert files(saved) == before


def test_a_reader_ends_what_a_killed_writer_began(lm, saved):
    """One that died after the old preset had lost its name, and before the new one got it."""
    holder = saved.with_name(".saved.abcd_123.unfinished")
    (holder / "new").mkdir(parents=True)
    saved.rename(holder / "new" / "saved")
    (holder / "old").mkdir()
    again = keras_mamba2.Mamba2CausalLM.from_preset(saved)
    assert all(map(np.array_equal, again.get_weights(), lm.get_weights()))
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


# .keras


def test_an_error_leaves_the_old_file(changed, tmp_path, monkeypatch):
    file = tmp_path / "a.keras"
    changed.save(file)
    before = file.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(type(changed.preprocessor.tokenizer), "save_own_variables", fail)
    with pytest.raises(OSError, match="disk full"):
        changed.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.keras"]


def test_models_of_all_kinds_are_saved_beside(lm, tmp_path, monkeypatch):
    written = []
    save_model = keras.src.saving.saving_lib.save_model

    def recorded(model, filepath, *args, **kwargs):
        written.append(str(filepath))
        return save_model(model, filepath, *args, **kwargs)

    monkeypatch.setattr(keras.src.saving.saving_lib, "save_model", recorded)
    forecaster = keras_mamba2.Mamba2Forecaster(
        horizon=1, num_features=1, num_layers=1, hidden_dim=8, state_dim=2, head_dim=4
    )
    classifier = keras_mamba2.Mamba2TextClassifier(lm.backbone, num_classes=2)
    for model in (lm, lm.backbone, classifier, forecaster):
        model.save(tmp_path / "a.keras")
    assert len(written) == 4
    assert all(".a.keras." in name and ".unfinished" in name for name in written)


def test_overwriting_is_asked_for(lm, tmp_path, monkeypatch):
    file = tmp_path / "a.keras"
    file.write_text("old")
    for answer in ("n", "y"):
        monkeypatch.setattr("builtins.input", lambda text, answer=answer: answer)
        lm.save(file, overwrite=False)
        assert (file.read_bytes() == b"old") == (answer == "n")


def test_unzipped_folders_and_wrong_names(lm, tmp_path):
    folder = tmp_path / "folder"
    for _ in range(2):
        lm.save(folder, zipped=False)
        for name in files(folder):
            assert any(fnmatch.fnmatchcase(name, pattern) for pattern in saving.UNZIPPED_FILES)
    assert json.loads((folder / "config.json").read_text())["class_name"] == "Mamba2CausalLM"
    (folder / "mine").touch()
    with pytest.raises(ValueError, match="mine"):
        lm.save(folder, zipped=False)
    with pytest.raises(ValueError, match="extension"):
        lm.save(tmp_path / "a.model")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
