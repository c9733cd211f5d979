"""Adapters of the `peft` library for transformers' Mamba-2, read and written."""

import json

import keras
import numpy as np
import peft
import pytest
import torch
from keras import ops
from safetensors.torch import load_file
from safetensors.torch import save_file

import keras_mamba2
from keras_mamba2.models import lora
from tests.conversion import checkpoints
from tests.hub_server import Hub
from tests.hub_server import point_client_to
from tests.hub_server import serving

# `peft` asks transformers in a way of before.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

BOTH = ["in_proj", "out_proj"]
# Of `peft.LoraConfig`, by name.
CASES = {
    "list": {"target_modules": ["in_proj"], "r": 4, "lora_alpha": 7},
    "rslora": {"target_modules": ["in_proj"], "r": 3, "use_rslora": True},
    "regex": {"target_modules": r".*layers\.1\.mixer\.in_proj", "r": 2},
    "both": {"target_modules": BOTH, "r": 4, "lora_dropout": 0.1},
    "all-linear": {"target_modules": "all-linear", "r": 2},
    "patterns": {
        "target_modules": BOTH,
        "r": 4,
        "rank_pattern": {"out_proj": 2, r"layers\.1\.mixer\.in_proj": 3},
        "alpha_pattern": {"^backbone.layers.0.mixer.in_proj": 5},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of transformers with groups."""
    model = checkpoints.random_model("groups")
    return checkpoints.save_transformers(model, tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def with_out_proj(monkeypatch):
    """Lets `peft` adapt out_proj, which is right where no fused CUDA kernel runs."""
    monkeypatch.setattr(
        peft.tuners.tuners_utils, "_check_lora_target_modules_mamba", lambda *args: None
    )


@pytest.fixture
def lm(folder):
    return keras_mamba2.Mamba2CausalLM.from_preset(folder, preprocessor=None)


def peft_model(case="list", **changes):
    """The same checkpoint with random adapters of `peft`."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**CASES[case], **changes})
    model = peft.get_peft_model(checkpoints.random_model("groups"), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def adapter_folder(path, **changes):
    """What `peft` saves, with changes to its configuration."""
    peft_model().save_pretrained(path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return path


def logits_of(lm):
    ids = checkpoints.token_ids()
    logits = lm({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    return np.asarray(ops.convert_to_numpy(logits), np.float64)


def assert_as_close_to_the_truth(lm, model):
    truth = checkpoints.torch_logits_in_float64(model)
    theirs = np.abs(checkpoints.torch_logits(model) - truth).max()
    # `peft` multiplies with the factors one after the other, Keras with a sum; 2.5 was seen.
    assert np.abs(logits_of(lm) - truth).max() <= 4 * theirs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("with_out_proj")
def test_an_adapter_of_peft_and_back(case, lm, tmp_path):
    model = peft_model(case)
    model.save_pretrained(tmp_path / "theirs")
    lm.load_peft_adapter(tmp_path / "theirs")
    assert_as_close_to_the_truth(lm, model)

    adapts_out_proj = any(
        layer.name == "out_proj" for layer in lora.adapted_projections(lm.backbone)
    )
    if adapts_out_proj:
        with pytest.warns(UserWarning, match="`peft` refuses for Mamba-2"):
            lm.save_peft_adapter(tmp_path / "ours")
    else:
        lm.save_peft_adapter(tmp_path / "ours")
    theirs, ours = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    again = peft.PeftModel.from_pretrained(
        checkpoints.random_model("groups"), tmp_path / "ours"
    ).eval()
    np.testing.assert_allclose(
        checkpoints.torch_logits(again), checkpoints.torch_logits(model), rtol=1e-6, atol=1e-6
    )


def test_an_adapter_of_ours_in_peft(lm, tmp_path):
    keras.utils.set_random_seed(0)
    lm.backbone.enable_lora(2, ["in_proj"])
    rng = np.random.default_rng(0)
    for layer in lora.adapted_projections(lm.backbone):
        layer.lora_kernel_b.assign(0.1 * rng.normal(size=layer.lora_kernel_b.shape))
    lm.save_peft_adapter(tmp_path / "ours", base_model_name_or_path="user/model")
    config = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert config.base_model_name_or_path == "user/model"
    assert config.target_modules == {"in_proj"}
    base = checkpoints.random_model("groups")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert_as_close_to_the_truth(lm, model)
    # Merged on both sides, and exported: one model.
    lm.backbone.merge_lora()
    assert_as_close_to_the_truth(lm, model.merge_and_unload())


def test_peft_still_refuses_out_proj(lm, tmp_path):
    """The reason for our warning. Where this fails, the warning can go."""
    lm.backbone.enable_lora(2)
    with pytest.warns(UserWarning, match="`peft` refuses for Mamba-2"):
        lm.save_peft_adapter(tmp_path / "ours")
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        peft.PeftModel.from_pretrained(checkpoints.random_model("groups"), tmp_path / "ours")


def test_adapters_are_replaced_also_in_compiled_programs(lm, tmp_path):
    """The second differs in its scale alone, which is a constant of the programs."""
    lm.compile(sampler="greedy")
    ids = checkpoints.token_ids()[:1, :5]
    prompt = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    inputs = {name: np.pad(value, [(0, 0), (0, 8)]) for name, value in prompt.items()}

    def generated():
        return lm.generate(inputs, stop_token_ids=None)["token_ids"]

    lm.load_peft_adapter(adapter_folder(tmp_path / "weak", lora_alpha=0))
    weak = generated()
    lm.load_peft_adapter(adapter_folder(tmp_path / "strong", lora_alpha=40))
    strong = generated()
    assert not np.array_equal(weak, strong)
    lm.backbone.merge_lora()
    assert np.array_equal(generated(), strong)


def test_an_adapter_from_the_hub(lm, tmp_path, monkeypatch):
    files = adapter_folder(tmp_path / "local")
    content = {file.name: file.read_bytes() for file in files.iterdir()}
    lm.load_peft_adapter(files)
    expected = logits_of(lm)
    with serving(Hub({"user/adapter": content})) as address:
        point_client_to(address, tmp_path / "cache", monkeypatch)
        lm.load_peft_adapter("hf://user/adapter")
    assert np.array_equal(logits_of(lm), expected)


def test_a_bin_file_and_half_precision(lm, tmp_path):
    files = adapter_folder(tmp_path / "new")
    tensors = load_file(files / "adapter_model.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    (files / "adapter_model.safetensors").unlink()
    torch.save(tensors, files / "adapter_model.bin")
    lm.load_peft_adapter(files)
    layer = lm.backbone.blocks[1].mixer.in_proj
    expected = tensors["base_model.model.backbone.layers.1.mixer.in_proj.lora_A.weight"]
    assert np.array_equal(ops.convert_to_numpy(layer.lora_kernel_a.value).T, expected.float())


def assert_refused(lm, files, message):
    before = [v.path for v in lm.trainable_variables]
    with pytest.raises(ValueError, match=message):
        lm.load_peft_adapter(files)
    assert [v.path for v in lm.trainable_variables] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "`peft_type` must be one of .*Received: peft_type='IA3'"),
        ({"task_type": "SEQ_CLS"}, "`task_type` must be one of .*Received: task_type='SEQ_CLS'"),
        ({"bias": "all"}, "`bias` must be one of .*Received: bias='all'"),
        ({"use_dora": True}, "uses `use_dora`, which is not supported.*merge_and_unload"),
        ({"modules_to_save": ["lm_head"]}, r"uses `modules_to_save`.*Received:.*\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` must be one of .*'pissa'"),
        ({"target_parameters": 5}, "`target_parameters` must be a list of names.*Received: 5"),
        ({"something_new": 3}, "uses `something_new`, which is not supported"),
        ({"r": 5}, r"lora_A has shape \(4, 16\), and needs \(5, 16\) for rank 5"),
    ],
)
def test_what_there_is_no_place_for_is_named(lm, tmp_path, changes, message):
    files = adapter_folder(tmp_path / "new", **changes)
    assert_refused(lm, files, f"{files}: .*{message}")


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (("mixer.in_proj", "self_attn.q_proj"), "another architecture.*layers.0.self_attn.q_proj"),
        (("layers.1.", "layers.7."), "another architecture.*Without a place: backbone.layers.7."),
        (("in_proj", "conv1d"), "another architecture, or of modules that cannot be adapted"),
        (("1.mixer.in_proj.lora_B", "1.other.lora_B"), "without both lora_A and lora_B"),
        (("lora_A.weight", "lora_embedding_A"), "no place for these tensors: .*lora_embedding_A"),
    ],
)
def test_an_adapter_of_another_architecture_is_refused(lm, tmp_path, rename, message):
    files = adapter_folder(tmp_path / "new")
    tensors = load_file(files / "adapter_model.safetensors")
    tensors = {name.replace(*rename): tensor for name, tensor in tensors.items()}
    save_file(tensors, files / "adapter_model.safetensors")
    assert_refused(lm, files, message)


def test_an_adapter_of_another_size_is_refused(tmp_path, folder):
    model = checkpoints.random_model("groups", hidden_size=32, num_heads=8)
    other = checkpoints.save_transformers(model, tmp_path / "other")
    lm = keras_mamba2.Mamba2CausalLM.from_preset(other, preprocessor=None)
    assert_refused(lm, adapter_folder(tmp_path / "new"), "one of a model of another size")


def test_missing_files_are_named(lm, tmp_path):
    files = adapter_folder(tmp_path / "new")
    assert_refused(lm, tmp_path / "absent", "absent is not a folder.*'hf://user/name'")
    (files / "adapter_model.safetensors").unlink()
    assert_refused(lm, files, "No weights. Expected one of: adapter_model.safetensors")
    (files / "adapter_config.json").unlink()
    assert_refused(lm, files, "Missing: adapter_config.json")


def test_nothing_to_save_is_said(lm, tmp_path):
    with pytest.raises(ValueError, match="no LoRA adapter to save. Call `backbone.enable_lora`"):
        lm.save_peft_adapter(tmp_path / "ours")
    assert not list(tmp_path.iterdir())
