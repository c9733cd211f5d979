"""`from_preset` on checkpoints of other libraries: local, from a hub, by name."""

import json
import logging
import os
import shutil
import sys
from types import SimpleNamespace

import jax
import keras
import keras_hub
import numpy as np
import pytest
import tokenizers
import torch

import keras_mamba2
from keras_mamba2 import preset_files
from keras_mamba2._compat.keras_variables import has_value
from keras_mamba2._compat.keras_variables import pending_initializations
from keras_mamba2.conversion import describe
from keras_mamba2.conversion import preset_loader
from tests.conftest import SHARED_DATA
from tests.conversion import checkpoints
from tests.hub_server import COMMIT
from tests.hub_server import Hub
from tests.hub_server import point_client_to
from tests.hub_server import serving

PROMPTS = ["To be", "or not to be, that is", "?"]


@pytest.fixture(scope="module")
def model():
    """A model of transformers whose vocabulary is that of the byte tokenizer, padded to 272."""
    return checkpoints.random_model("plain", vocab_size=272)


@pytest.fixture(scope="module")
def folders(model, byte_tokenizer, tmp_path_factory):
    """The same model in the three formats, each with its tokenizer."""
    parent = tmp_path_factory.mktemp("formats")
    transformers = checkpoints.save_transformers(model, parent / "transformers")
    original = checkpoints.save_state_spaces(model, parent / "original", unpadded=257)
    for folder in (transformers, original):
        byte_tokenizer.engine.save(str(folder / "tokenizer.json"))
        tokens = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": None}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    lm = keras_mamba2.Mamba2CausalLM.from_preset(original)
    lm.save_to_preset(parent / "keras")
    return {path.name: path for path in (transformers, original, parent / "keras")}


@pytest.fixture
def hub(folders, monkeypatch, tmp_path):
    """A hub on loopback that serves the three folders, and an empty cache."""
    repositories = {
        f"user/{name}": {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }
        for name, folder in folders.items()
    }
    served = Hub(repositories)
    with serving(served) as address:
        point_client_to(address, tmp_path / "cache", monkeypatch)
        yield served


def generate(preset):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset)
    lm.compile(sampler="greedy")
    return lm.generate(PROMPTS, max_new_tokens=20)


def test_every_format_gives_the_same_text(folders):
    texts = {name: generate(folder) for name, folder in folders.items()}
    assert texts["transformers"] == texts["original"] == texts["keras"]


def test_no_weight_is_drawn_that_the_files_replace(folders, monkeypatch):
    drawn = []

    def recording(draw):
        def recorded(*args, **kwargs):
            value = draw(*args, **kwargs)
            if not isinstance(value, jax.core.Tracer):
                drawn.append(value)
            return value

        return recorded

    for name in ("uniform", "normal", "truncated_normal"):
        draw = getattr(keras.src.backend.random, name)
        monkeypatch.setattr(keras.src.backend.random, name, recording(draw))
    backbone = keras_mamba2.Mamba2Backbone.from_preset(folders["transformers"])
    assert not drawn
    keras_mamba2.Mamba2Backbone.from_config(backbone.get_config())
    assert drawn  # or nothing was recorded
    assert all(has_value(variable) for variable in backbone.variables)


def test_dropout_of_a_checkpoint_has_its_seeds(folders):
    backbone = keras_mamba2.Mamba2Backbone.from_preset(folders["original"], dropout=0.5)
    inputs = {"token_ids": np.ones((1, 8), "int32"), "padding_mask": np.ones((1, 8), "int32")}
    first, second = (np.asarray(backbone(inputs, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 0.01


def test_a_checkpoint_that_is_refused_leaves_nothing_to_initialize(folders, tmp_path):
    folder = shutil.copytree(folders["transformers"], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    with pytest.raises(ValueError, match="missing in the files"):
        keras_mamba2.Mamba2Backbone.from_preset(folder)
    assert not pending_initializations()


@pytest.mark.parametrize("name", ["transformers", "original", "keras"])
def test_every_format_loads_from_a_hub_and_then_offline(hub, folders, name, monkeypatch):
    texts = generate(f"hf://user/{name}")
    assert texts == generate(folders[name])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = len(hub.asked)
    assert generate(f"hf://user/{name}") == texts
    assert len(hub.asked) == before


def test_safetensors_come_before_bin(hub, folders):
    files = hub.repositories["user/transformers"]
    files["pytorch_model.bin"] = files["consolidated.safetensors"] = b"not to be read"
    keras_mamba2.Mamba2Backbone.from_preset("hf://user/transformers")
    names = {path.rsplit("/", 1)[1] for path in hub.downloads()}
    assert names == {"config.json", "model.safetensors"}


def test_shards_come_with_their_index(model, hub, tmp_path):
    sharded = checkpoints.save_transformers(model, tmp_path / "sharded", max_shard_size="20KB")
    files = {file.name: file.read_bytes() for file in sharded.iterdir()}
    assert "model.safetensors.index.json" in files
    hub.repositories["user/sharded"] = files
    backbone = keras_mamba2.Mamba2Backbone.from_preset("hf://user/sharded")
    checkpoints.assert_same_weights(backbone, checkpoints.load(sharded))


def test_shards_may_have_any_names(model, hub, tmp_path):
    sharded = checkpoints.save_transformers(model, tmp_path / "sharded", max_shard_size="20KB")
    files = {file.name: file.read_bytes() for file in sharded.iterdir()}
    index = "model.safetensors.index.json"
    renamed = {name: name.replace("model-", "ft-model-") for name in files}
    for old, new in renamed.items():
        files[index] = files[index].replace(old.encode(), new.encode())
    files = {renamed[name] if name != index else name: data for name, data in files.items()}
    files["model-00001-of-00009.safetensors"] = b"not to be read"
    hub.repositories["user/renamed"] = files
    backbone = keras_mamba2.Mamba2Backbone.from_preset("hf://user/renamed")
    checkpoints.assert_same_weights(backbone, checkpoints.load(sharded))
    names = {path.rsplit("/", 1)[1] for path in hub.downloads()}
    assert {"config.json", index} < names
    assert not any(name.startswith("model-") for name in names)


def test_tokens_that_were_added_are_generated(folders, tmp_path, byte_tokenizer):
    """In rows that were padding, of a vocabulary that says so no more."""
    shutil.copytree(folders["original"], tmp_path / "more")
    engine = tokenizers.Tokenizer.from_str(byte_tokenizer.engine.to_str())
    engine.add_special_tokens(["<|im_end|>"])
    engine.save(str(tmp_path / "more" / "tokenizer.json"))
    lm = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "more")
    assert (lm.backbone.unpadded_vocabulary_size, lm.num_tokens) == (257, 258)
    bias = lm.logits(np.eye(1, lm.backbone.hidden_dim))[0]
    assert bias[257] > -1e8 > bias[258]


def test_all_four_classes(folders):
    folder = folders["transformers"]
    tokenizer = keras_mamba2.Mamba2Tokenizer.from_preset(folder)
    assert (tokenizer.start_token, tokenizer.end_token) == (None, "<|endoftext|>")
    preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor.from_preset(folder, sequence_length=9)
    assert preprocessor.sequence_length == 9
    backbone = keras_mamba2.Mamba2Backbone.from_preset(folder, dtype="bfloat16")
    assert backbone.token_embedding.embeddings.dtype == "bfloat16"
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder, preprocessor=None, dtype="bfloat16")
    assert lm.preprocessor is None
    assert lm.backbone.token_embedding.embeddings.dtype == "bfloat16"


def test_without_weights_only_the_architecture_is_needed(folders, tmp_path):
    shutil.copy(folders["original"] / "config.json", tmp_path)
    lm = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path, load_weights=False, preprocessor=None)
    assert lm.backbone.vocabulary_size == 272
    with pytest.raises(ValueError, match="holds no weights"):
        keras_mamba2.Mamba2Backbone.from_preset(tmp_path)


@pytest.fixture
def registered(monkeypatch):
    for name, module in list(sys.modules.items()):  # to put it back afterwards
        if name.startswith("keras_hub.") and "get_preset_loader" in vars(module):
            monkeypatch.setattr(module, "get_preset_loader", module.get_preset_loader)
    keras_mamba2.register()
    keras_mamba2.register()


def test_keras_hub_finds_named_presets_after_register(
    registered, hub, folders, tmp_path, monkeypatch
):
    sources = {"weights": "hf://user/original", "tokenizer": "hf://user/transformers"}
    (tmp_path / "sources.json").write_text(json.dumps(sources))
    monkeypatch.setattr(preset_files, "named_presets", lambda: {"mamba2_named": tmp_path})
    monkeypatch.setattr(preset_loader, "named_presets", preset_files.named_presets)
    lm = keras_hub.models.CausalLM.from_preset("mamba2_named")
    assert isinstance(lm, keras_mamba2.Mamba2CausalLM)


def test_keras_hub_finds_saved_hybrids_after_register(registered, byte_tokenizer, tmp_path):
    keras.utils.set_random_seed(0)
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=257,
        hidden_dim=16,
        blocks=["mamba2", "mlp"],
        sublayers={"mamba2": {"state_dim": 8, "head_dim": 8}, "mlp": {"intermediate_dim": 24}},
    )
    preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(byte_tokenizer, sequence_length=17)
    keras_mamba2.Mamba2CausalLM(backbone, preprocessor).save_to_preset(tmp_path / "hybrid")
    for find in (keras_hub.models.CausalLM, keras_mamba2.Mamba2CausalLM):
        lm = find.from_preset(str(tmp_path / "hybrid"))
        assert isinstance(lm, keras_mamba2.Mamba2CausalLM)
        assert lm.preprocessor.sequence_length == 17
        assert all(map(np.array_equal, lm.get_weights(), backbone.get_weights()))
    for find in (keras_hub.models.Backbone, keras_mamba2.Mamba2HybridBackbone):
        found = find.from_preset(str(tmp_path / "hybrid"))
        assert isinstance(found, keras_mamba2.Mamba2HybridBackbone)
        assert all(map(np.array_equal, found.get_weights(), backbone.get_weights()))
    for find in (keras_hub.tokenizers.Tokenizer, keras_mamba2.Mamba2Tokenizer):
        tokenizer = find.from_preset(str(tmp_path / "hybrid"))
        assert tokenizer("to be").tolist() == [*b"to be"]
    find = keras_hub.models.CausalLMPreprocessor
    assert find.from_preset(str(tmp_path / "hybrid")).sequence_length == 17
    with pytest.raises(ValueError, match="call `from_preset` of that class"):
        keras_mamba2.Mamba2Backbone.from_preset(tmp_path / "hybrid")


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("name", ["keras", "transformers"])
def test_a_tokenizer_has_the_dtype_that_is_asked_for(folders, name, dtype):
    tokenizer = keras_mamba2.Mamba2Tokenizer.from_preset(folders[name], dtype=dtype)
    assert tokenizer("to be").dtype == dtype


def test_keras_hub_finds_us_after_register(registered, folders):
    lm = keras_hub.models.CausalLM.from_preset(str(folders["original"]))
    assert isinstance(lm, keras_mamba2.Mamba2CausalLM)
    lm.compile(sampler="greedy")
    assert lm.generate(PROMPTS, max_new_tokens=20) == generate(folders["original"])
    backbone = keras_hub.models.Backbone.from_preset(str(folders["keras"]))
    assert isinstance(backbone, keras_mamba2.Mamba2Backbone)


@pytest.mark.slow
def test_padding_rows_are_never_sampled(folders):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folders["original"])
    assert (lm.backbone.vocabulary_size, lm.num_tokens) == (272, 257)
    without_tokenizer = keras_mamba2.Mamba2CausalLM(lm.backbone)
    # Rows that would win every draw.
    embeddings = lm.backbone.token_embedding.embeddings
    value = embeddings.numpy()
    value[257:] = 100 * np.sign(value[65])
    embeddings.assign(value)
    mask = np.arange(8)[None] < 4
    inputs = {"token_ids": np.full((1, 8), 65), "padding_mask": mask}
    logits = lm.backbone.token_embedding(lm.backbone(inputs), reverse=True)[0, 3]
    assert int(np.argmax(logits)) >= 257, "the case does not show anything"
    assert int(np.argmax(lm(inputs)[0, 3])) < 257
    for sampler in ("greedy", "top_k", "top_p", "random", "beam", "contrastive"):
        if sampler == "contrastive":
            sampler = keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.3)
        without_tokenizer.compile(sampler=sampler)
        ids = without_tokenizer.generate(inputs, stop_token_ids=None)["token_ids"]
        assert np.max(ids) < 257


def test_transformers_keep_padding_rows_apart(folders, tmp_path):
    """transformers knows no padding rows; our export carries the number along."""
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folders["original"])
    lm.export_to_transformers(tmp_path / "exported")
    again = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "exported", preprocessor=None)
    assert again.num_tokens == 257


# Logits of all of them are compared in test_load.py.
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("plain", "groups") else pytest.param(name, marks=pytest.mark.slow)
        for name in checkpoints.GRID
    ],
)
def test_greedy_continuation_is_that_of_transformers(name, tmp_path):
    model = checkpoints.random_model(name)
    folder = checkpoints.save_transformers(model, tmp_path / "model")
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder, preprocessor=None)
    lm.compile(sampler="greedy")
    prompt = checkpoints.token_ids()[:, :20]
    with torch.no_grad():
        expected = model.generate(
            torch.from_numpy(prompt),
            attention_mask=torch.ones(prompt.shape, dtype=torch.int64),
            max_new_tokens=64,
            do_sample=False,
            use_cache=True,
        )
    inputs = {"token_ids": prompt, "padding_mask": np.ones_like(prompt)}
    actual = lm.generate(inputs, stop_token_ids=None, max_new_tokens=64)["token_ids"]
    np.testing.assert_array_equal(actual, expected)


def test_the_preset_of_a_name_may_lie_on_a_hub(hub, folders, tmp_path, monkeypatch):
    folder = tmp_path / "named"
    folder.mkdir()
    shutil.copy(folders["original"] / "config.json", folder)
    sources = {"weights": "hf://user/original", "tokenizer": "hf://user/transformers"}
    (folder / "sources.json").write_text(json.dumps(sources))
    monkeypatch.setattr(preset_files, "named_presets", lambda: {"mamba2_named": folder})
    backbone = keras_mamba2.Mamba2Backbone.from_preset("mamba2_named", load_weights=False)
    assert backbone.vocabulary_size == 272
    assert not hub.asked
    assert generate("mamba2_named") == generate(folders["original"])


def test_the_architecture_may_come_with_the_weights(hub, folders, tmp_path, monkeypatch):
    folder = tmp_path / "named"
    folder.mkdir()
    sources = {"weights": "hf://user/original", "tokenizer": "hf://user/transformers"}
    (folder / "sources.json").write_text(json.dumps(sources))
    monkeypatch.setattr(preset_files, "named_presets", lambda: {"mamba2_named": folder})
    assert describe("mamba2_named")["vocabulary"] == "257 tokens, 272 rows"
    backbone = keras_mamba2.Mamba2Backbone.from_preset("mamba2_named", load_weights=False)
    assert backbone.vocabulary_size == 272
    assert {
        path.rpartition("/")[2] for way, path in hub.asked if way == "GET" and "resolve" in path
    } == {"config.json"}
    assert generate("mamba2_named") == generate(folders["original"])


@pytest.mark.parametrize("name", ["falcon_h1_3b", "zamba2_7b"])
def test_a_preset_without_an_architecture_asks_its_repository(hub, name):
    weights = preset_files.read_sources(preset_files.named_presets()[name] / "sources.json")[
        "weights"
    ]
    with pytest.raises(ValueError, match=weights.removeprefix("hf://")):
        keras_mamba2.Mamba2CausalLM.from_preset(name)


def test_a_pinned_preset_is_loaded_from_its_commit(hub, folders, tmp_path, monkeypatch):
    folder = tmp_path / "named"
    folder.mkdir()
    shutil.copy(folders["original"] / "config.json", folder)
    sources = {"weights": "hf://user/original", "tokenizer": "hf://user/transformers"}
    monkeypatch.setattr(preset_files, "named_presets", lambda: {"mamba2_pinned": folder})

    def load(commit):
        revision = {"weights": commit, "tokenizer": COMMIT}
        (folder / "sources.json").write_text(json.dumps({**sources, "revision": revision}))
        return keras_mamba2.Mamba2CausalLM.from_preset("mamba2_pinned")

    load(COMMIT)
    paths = {path for _, path in hub.asked if "user/" in path}
    assert {path.split("/user/")[1].split("/")[0] for path in paths if "/api/" in path} == {
        "original",
        "transformers",
    }
    assert all(COMMIT in path for path in paths), "the newest files were asked for"
    with pytest.raises(ValueError, match=f"no revision '{'f' * 40}'"):
        load("f" * 40)


@pytest.fixture
def without_tokenizer(folders, tmp_path):
    folder = shutil.copytree(folders["original"], tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    return folder


def test_a_missing_tokenizer_is_found_before_weights_are_read(without_tokenizer):
    (without_tokenizer / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ValueError, match="no tokenizer .* vocabulary of 257 is not that of GPT-N"):
        keras_mamba2.Mamba2CausalLM.from_preset(without_tokenizer)


def test_the_original_models_get_the_tokenizer_of_gpt_neox(
    without_tokenizer, hub, caplog, monkeypatch
):
    file = SHARED_DATA / "gpt-neox-20b" / "tokenizer.json"
    if not file.exists():
        pytest.skip("the GPT-NeoX tokenizer of the shared data is absent")
    config = json.loads((without_tokenizer / "config.json").read_text())
    config.update(vocab_size=50277, d_model=16)
    (without_tokenizer / "config.json").write_text(json.dumps(config))
    tokens = {name: "<|endoftext|>" for name in ("bos_token", "eos_token")}
    hub.repositories["EleutherAI/gpt-neox-20b"] = {
        "config.json": b"{}",
        "tokenizer.json": file.read_bytes(),
        "tokenizer_config.json": json.dumps(tokens).encode(),
        "model-00001-of-00046.safetensors": b"never read",
    }
    with caplog.at_level(logging.WARNING):
        lm = keras_mamba2.Mamba2CausalLM.from_preset(without_tokenizer, load_weights=False)
    assert "Taking that of GPT-NeoX: hf://EleutherAI/gpt-neox-20b" in caplog.text
    assert lm.preprocessor.tokenizer.end_token_id == 0
    assert (lm.backbone.vocabulary_size, lm.num_tokens) == (50288, 50277)
    assert not [path for path in hub.downloads() if path.endswith(".safetensors")]


def test_offline_the_missing_tokenizer_is_named(without_tokenizer, hub, monkeypatch):
    config = json.loads((without_tokenizer / "config.json").read_text())
    (without_tokenizer / "config.json").write_text(json.dumps({**config, "vocab_size": 50277}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="`hf download EleutherAI/gpt-neox-20b`"):
        keras_mamba2.Mamba2CausalLM.from_preset(without_tokenizer, load_weights=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba", "hidden_size": 8}, "is a Mamba-1 model"),
        ({"model_type": "llama"}, "Unknown `model_type`"),
        (
            {"d_model": 8, "n_layer": 2, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [1]},
            "has no `vocab_size`",
        ),
    ],
)
def test_other_models_are_named_with_their_file(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for cls in (keras_mamba2.Mamba2CausalLM, keras_mamba2.Mamba2Tokenizer):
        with pytest.raises(ValueError, match=f"{tmp_path / 'config.json'}.*{message}"):
            cls.from_preset(tmp_path)


def test_special_tokens_come_from_the_tokenizer_not_the_configuration(byte_tokenizer, tmp_path):
    """Codestral's configuration names ids that are not those of its tokenizer."""
    byte_tokenizer.engine.save(str(tmp_path / "tokenizer.json"))
    ids = {"bos_token_id": 0, "eos_token_id": 256, "pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(ids))
    tokens = preset_loader.tokenizer_arguments(tmp_path)
    assert (tokens["start_token"], tokens["end_token"]) == (None, "<|endoftext|>")
    names = {"bos_token": "a", "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokens = preset_loader.tokenizer_arguments(tmp_path)
    assert (tokens["start_token"], tokens["end_token"]) == ("a", None)


def test_a_saved_preset_is_what_keras_hub_uploads(folders, monkeypatch):
    uploaded = {}
    monkeypatch.setattr(
        "huggingface_hub.create_repo", lambda repo_id, exist_ok: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr("huggingface_hub.file_exists", lambda repo_id, filename: True)
    monkeypatch.setattr(
        "huggingface_hub.upload_folder",
        lambda repo_id, folder_path: uploaded.update({repo_id: os.listdir(folder_path)}),
    )
    keras_hub.upload_preset("hf://me/my_model", str(folders["keras"]))
    assert {"config.json", "model.weights.h5", "tokenizer.json"} <= set(uploaded["me/my_model"])


@pytest.mark.parametrize("name", ["transformers", "keras"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_auto_is_the_dtype_of_the_files(folders, tmp_path, name, dtype):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folders["original"], dtype=dtype)
    if name == "keras":
        lm.save_to_preset(tmp_path / name)
    else:
        lm.export_to_transformers(tmp_path / name)
    for load in (
        keras_mamba2.Mamba2CausalLM.from_preset,
        keras_mamba2.Mamba2Backbone.from_preset,
    ):
        loaded = load(tmp_path / name, dtype="auto")
        assert loaded.dtype_policy.name == dtype
    assert keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / name).dtype_policy.name == "float32"


def test_auto_keeps_a_quantized_model(folders, tmp_path):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folders["original"])
    lm.quantize("int8")
    lm.save_to_preset(tmp_path / "int8")
    loaded = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "int8", dtype="auto")
    for model in (lm, loaded):
        model.compile(sampler="greedy")
    assert loaded.generate(PROMPTS, max_length=40) == lm.generate(PROMPTS, max_length=40)
    kernels = [w.dtype for w in loaded.backbone.weights if w.path.endswith("proj/kernel")]
    assert set(kernels) == {"int8"}


def test_options_of_the_preprocessor(folders):
    load = keras_mamba2.Mamba2CausalLM.from_preset
    preprocessor = load(folders["original"], sequence_length=24, packing=True).preprocessor
    assert preprocessor.packing
    x, _, _ = preprocessor(["To be", "or not to be", "that is the question"])
    assert x["token_ids"].shape[1] == 24
    with pytest.raises(ValueError, match="packing on the `preprocessor`"):
        load(folders["original"], packing=True, preprocessor=None)
