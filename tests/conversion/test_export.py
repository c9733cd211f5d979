"""What is exported loads in transformers and computes the same, and comes back bit for bit."""

import contextlib
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import keras_mamba2
from keras_mamba2 import conversion
from keras_mamba2.conversion import export
from keras_mamba2.conversion.architectures.granite import GRANITE
from tests.conversion import checkpoints
from tests.conversion.checkpoints import load


@pytest.fixture(scope="module", params=checkpoints.GRID)
def name(request):
    return request.param


def test_round_trip_of_transformers(name, tmp_path):
    model = checkpoints.random_model(name)
    backbone = load(checkpoints.save_transformers(model, tmp_path / "model"))
    fractional = name == "expand_1.5"
    warns = pytest.warns(UserWarning, match="is not a whole number")
    with warns if fractional else contextlib.nullcontext():
        conversion.export_to_transformers(backbone, None, tmp_path / "exported")
    checkpoints.assert_same_weights(backbone, load(tmp_path / "exported"))
    if not fractional:
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
        assert again.dtype == torch.float32
        for layer in again.backbone.layers:  # not of the model, but of how it is computed
            layer.mixer.chunk_size = model.config.chunk_size
        assert np.array_equal(checkpoints.torch_logits(again), checkpoints.torch_logits(model))


@pytest.fixture(scope="module")
def backbone():
    return keras_mamba2.Mamba2Backbone(
        vocabulary_size=257, num_layers=2, hidden_dim=16, head_dim=8, state_dim=8
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_in_shards(tmp_path, dtype):
    backbone = keras_mamba2.Mamba2Backbone(
        vocabulary_size=48,
        num_layers=2,
        hidden_dim=16,
        head_dim=8,
        state_dim=8,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    conversion.export_to_transformers(backbone, None, tmp_path / "new", shard_bytes=6000)
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 1
    checkpoints.assert_same_weights(backbone, load(tmp_path / "new", dtype=dtype))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.dtype == getattr(torch, dtype)


def test_dtype_of_the_files(backbone, tmp_path):
    conversion.export_to_transformers(backbone, None, tmp_path / "new", dtype="bfloat16")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    for name, tensor in tensors.items():
        kept = name.endswith(("A_log", "dt_bias", "D"))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_numbers_too_large_for_the_dtype_are_named_and_nothing_is_left(backbone, tmp_path):
    weight = backbone.norm.scale
    before = weight.numpy() if hasattr(weight, "numpy") else np.array(weight)
    weight.assign(np.where(np.arange(before.size) == 1, 7e4, before))
    try:
        with pytest.raises(ValueError, match=r"norm_f.weight \(1 infinite of .* in float16\)"):
            conversion.export_to_transformers(backbone, None, tmp_path / "new", dtype="float16")
    finally:
        weight.assign(before)
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_gives_the_same_ids(backbone, byte_tokenizer, tmp_path):
    conversion.export_to_transformers(backbone, byte_tokenizer, tmp_path / "new")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    for text in ("To be, or\n  not", "naïve 日本語 🙂", "a<|endoftext|>b", ""):
        assert tokenizer(text)["input_ids"] == byte_tokenizer(text).tolist()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 256)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 256


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interruption_leaves_nothing(backbone, tmp_path, monkeypatch, error):
    def interrupted(file, weights):
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(export, "write_safetensors", interrupted)
    with pytest.raises(type(error)):
        conversion.export_to_transformers(backbone, None, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken_and_a_full_one_refused(backbone, tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    conversion.export_to_transformers(backbone, None, folder)
    before = sorted(path.name for path in folder.iterdir())
    assert before == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match=f"{folder} exists already"):
        conversion.export_to_transformers(backbone, None, folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_unknown_dtype_is_refused(backbone, tmp_path):
    with pytest.raises(ValueError, match="`dtype` must be None or one of .*Received: dtype=int8"):
        conversion.export_to_transformers(backbone, None, tmp_path / "new", dtype="int8")


def test_lora_is_refused(tmp_path):
    backbone = keras_mamba2.Mamba2Backbone(
        vocabulary_size=16, num_layers=1, hidden_dim=16, head_dim=8, state_dim=8
    )
    backbone.enable_lora(2)
    with pytest.raises(
        ValueError, match="LoRA adapters.*path='block_0/mixer/in_proj/lora_kernel_a"
    ):
        conversion.export_to_transformers(backbone, None, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_without_all_of_its_parts_is_refused(tmp_path, monkeypatch):
    """As gate and up of an MLP that has no gate: half of the file would be what memory held."""
    sublayers = {"mlp": {"intermediate_dim": 8, "gated": False}, "mamba2": {"head_dim": 8}}
    backbone = keras_mamba2.Mamba2HybridBackbone(16, 16, ["mamba2", "mlp"], sublayers)
    monkeypatch.setattr(export, "exported_as", lambda config: (GRANITE, {}))
    with pytest.raises(ValueError, match=r"input_linear.weight is made of parts \[0, 1\].* \[1\]"):
        conversion.export_to_transformers(backbone, None, tmp_path / "new")
