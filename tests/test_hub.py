"""The real client of the Hugging Face hub against a server on loopback."""

import functools

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

import keras_mamba2
from keras_mamba2 import hub
from tests.conversion import hybrids
from tests.hub_server import COMMIT
from tests.hub_server import TOKEN
from tests.hub_server import Hub
from tests.hub_server import point_client_to
from tests.hub_server import serving

FILES = {
    "config.json": b'{"model_type": "mamba2"}',
    "weights.bin": bytes(range(256)) * 4096,
    "not_needed.bin": b"x" * 100,
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub with one repository, `user/model`, and an empty cache."""
    served = Hub({"user/model": dict(FILES)})
    with serving(served) as address:
        point_client_to(address, tmp_path / "cache", monkeypatch)
        yield served


def needed(names):
    missing = {"config.json", "weights.bin"} - set(names)
    if missing:
        raise ValueError(f"Missing: {', '.join(sorted(missing))}.")
    return ["config.json", "weights.bin"]


def assert_whole(folder):
    for name in needed(FILES):
        assert (folder / name).read_bytes() == FILES[name]


def test_only_what_is_needed_is_downloaded(server):
    folder = hub.fetch("hf://user/model", needed)
    assert_whole(folder)
    assert not (folder / "not_needed.bin").exists()
    count = len(server.downloads())
    assert count == 2
    assert hub.fetch("hf://user/model", needed) == folder
    assert len(server.downloads()) == count, "the cache was not used"


def test_a_download_that_was_cut_goes_on_where_it_ended(server, monkeypatch):
    # The client keeps whole chunks, of 10 MB each.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    server.cut["weights.bin"] = 300_000
    try:
        hub.fetch("hf://user/model", needed)
    except ValueError as error:
        assert "a download that was cut goes on" in str(error)  # noqa: PT017  client may retry
    assert_whole(hub.fetch("hf://user/model", needed))
    assert any(start > 0 for start in server.resumed_at)


def test_offline_the_cache_serves(server, monkeypatch):
    folder = hub.fetch("hf://user/model", needed)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(server.asked)
    assert hub.fetch("hf://user/model", needed) == folder
    assert len(server.asked) == before


def test_offline_what_is_not_cached_is_named(server, monkeypatch):
    hub.fetch("hf://user/model", lambda names: ["config.json"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"Missing: weights.bin.*`hf download user/model`"):
        hub.fetch("hf://user/model", needed)
    with pytest.raises(ValueError, match=r"hf://other/model could not be downloaded.*not in the"):
        hub.fetch("hf://other/model", needed)


def test_a_file_of_a_wrong_size_is_refused(server, tmp_path):
    server.sizes["weights.bin"] = 5_000_000
    with pytest.raises(ValueError, match=r"hf://user/model could not be downloaded"):
        hub.fetch("hf://user/model", needed)
    assert not list((tmp_path / "cache").rglob("snapshots/*/weights.bin"))


def test_a_missing_repository_is_named(server):
    with pytest.raises(ValueError, match="no repository hf://user/absent on the hub, or it is pri"):
        hub.fetch("hf://user/absent", needed)


def test_a_missing_revision_is_named(server):
    with pytest.raises(ValueError, match="no revision 'v9'"):
        hub.fetch("hf://user/model@v9", needed)


def test_a_missing_file_is_named(server):
    del server.repositories["user/model"]["weights.bin"]
    with pytest.raises(ValueError, match=r"hf://user/model: Missing: weights.bin"):
        hub.fetch("hf://user/model", needed)
    assert not server.downloads()


@pytest.mark.parametrize("handle", ["hf://", "hf://user", "hf:///model", "hf://user/"])
def test_a_handle_is_user_and_name(handle):
    with pytest.raises(ValueError, match="written 'hf://user/name'"):
        hub.parse(handle)


def test_a_revision_is_written_behind_an_at():
    assert hub.parse("hf://user/model") == ("user/model", None)
    assert hub.parse("hf://user/model@refs/pr/1") == ("user/model", "refs/pr/1")


@pytest.fixture(scope="module")
def lm():
    return keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")


def test_what_was_pushed_is_loaded(server, lm):
    address = lm.push_to_hub("user/new", private=True, token=TOKEN)
    assert address.endswith(f"/user/new/commit/{COMMIT}")
    assert server.commits == 1, "a reader could have seen half of it"
    again = keras_mamba2.Mamba2CausalLM.from_preset("hf://user/new")
    for model in (lm, again):
        model.compile(sampler="greedy")
    assert again.generate("ROMEO:", max_new_tokens=20) == lm.generate("ROMEO:", max_new_tokens=20)
    card = huggingface_hub.ModelCard(server.repositories["user/new"]["README.md"].decode())
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == "keras-hub"
    assert 'from_preset("hf://user/new")' in card.text


def test_a_classifier_is_pushed_too(server, lm):
    lm = keras_mamba2.Mamba2TextClassifier(lm.backbone, num_classes=3, preprocessor=None)
    lm.push_to_hub("user/judge", token=TOKEN)
    again = keras_mamba2.Mamba2TextClassifier.from_preset("hf://user/judge", preprocessor=None)
    assert again.num_classes == 3
    card = huggingface_hub.ModelCard(server.repositories["user/judge"]["README.md"].decode())
    assert card.data.pipeline_tag == "text-classification"
    assert "Mamba2TextClassifier.from_preset" in card.text


def test_a_forecaster_is_loaded_from_the_hub(server, tmp_path):
    forecaster = keras_mamba2.Mamba2Forecaster(2, num_layers=1, hidden_dim=8, head_dim=4)
    forecaster.save_to_preset(tmp_path / "preset")
    server.repositories["user/demand"] = {
        path.name: path.read_bytes() for path in (tmp_path / "preset").iterdir()
    }
    again = keras_mamba2.Mamba2Forecaster.from_preset("hf://user/demand")
    for loaded, saved in zip(again.get_weights(), forecaster.get_weights(), strict=True):
        np.testing.assert_array_equal(loaded, saved)


@pytest.mark.parametrize("name", hybrids.FAMILIES)
def test_a_model_of_transformers_is_loaded_from_the_hub(server, tmp_path, name):
    hybrids.random_model(name).save_pretrained(tmp_path / "model", max_shard_size="30KB")
    server.repositories["org/hybrid"] = {
        path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()
    }
    backbones = [
        keras_mamba2.Mamba2HybridBackbone.from_preset(preset)
        for preset in ("hf://org/hybrid", str(tmp_path / "model"))
    ]
    for loaded, local in zip(*(backbone.get_weights() for backbone in backbones), strict=True):
        np.testing.assert_array_equal(loaded, local)


def test_nothing_of_an_earlier_push_is_loaded(server, lm, monkeypatch):
    """As one file of weights beside shards, or a preprocessor that the new model has not."""
    lm.push_to_hub("user/again", token=TOKEN)
    other = keras_mamba2.Mamba2CausalLM(
        keras_mamba2.Mamba2Backbone.from_config(lm.backbone.get_config())
    )
    save = other.save_to_preset
    monkeypatch.setattr(other, "save_to_preset", functools.partial(save, max_shard_size=1e-3))
    other.push_to_hub("user/again", token=TOKEN)
    names = set(server.repositories["user/again"])
    assert "model_00001.weights.h5" in names
    assert not names & {"model.weights.h5", "preprocessor.json", "tokenizer.json"}
    assert "README.md" in names
    again = keras_mamba2.Mamba2CausalLM.from_preset("hf://user/again")
    assert again.preprocessor is None
    for loaded, pushed in zip(again.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(loaded, pushed)


@pytest.mark.parametrize("name", ["weights.bin", "template.jinja"])
def test_a_download_that_ends_in_the_middle_is_not_taken_for_whole(server, name):
    server.repositories["user/model"]["template.jinja"] = b"x"
    server.refused = {name}

    def all_but_one(names):
        return [*needed(names), *({"template.jinja"} & set(names))]

    with pytest.raises(ValueError, match=f"could not be downloaded.*{name}.*403"):
        hub.fetch("hf://user/model", all_but_one)
    server.refused = set()
    assert_whole(hub.fetch("hf://user/model", all_but_one))


def test_a_card_that_is_there_stays(server, lm):
    server.repositories["user/model"]["README.md"] = b"mine"
    lm.push_to_hub("hf://user/model", token=TOKEN)
    assert server.repositories["user/model"]["README.md"] == b"mine"


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_nothing_is_saved_for_an_unknown_user(server, lm, monkeypatch, tmp_path, token):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(lm, "save_to_preset", lambda folder: pytest.fail("saved"))
    with pytest.raises(ValueError, match="hf auth login"):
        lm.push_to_hub("user/new", token=token)
    assert "user/new" not in server.repositories


@pytest.mark.parametrize("handle", ["name", "", "hf://", "user/name@v1"])
def test_a_handle_that_is_none_is_refused(lm, handle):
    with pytest.raises(ValueError, match="handle|revision"):
        lm.push_to_hub(handle, token=TOKEN)
