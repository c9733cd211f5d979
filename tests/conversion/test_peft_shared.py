"""Adapters of Zamba2's shared blocks: one here, in `peft` one at each place of a block."""

import json

import numpy as np
import peft
import pytest
import torch
from keras import ops
from safetensors.torch import load_file
from safetensors.torch import save_file

import keras_mamba2
from keras_mamba2.models import lora
from tests.conversion import hybrids

# `peft` asks transformers in a way of before.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

NAME = "zamba, two blocks"
IDS = np.random.default_rng(0).integers(1, 60, size=(2, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    hybrids.random_model(NAME).save_pretrained(path)
    return path


@pytest.fixture
def lm(folder):
    return keras_mamba2.Mamba2CausalLM.from_preset(folder, preprocessor=None)


def logits_of(lm):
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    return np.asarray(ops.convert_to_numpy(lm(inputs)), np.float64)


def rms(a):
    return np.sqrt(np.mean(a**2))


@pytest.mark.parametrize(
    ("layers", "targets"),
    [(["query"], {"q_proj"}), (["query", "output"], {"q_proj", "o_proj"}), (["gate"], None)],
)
def test_every_place_has_the_adapter(lm, layers, targets, tmp_path):
    lm.backbone.enable_lora(2, layers)
    rng = np.random.default_rng(0)
    for layer in lora.adapted_projections(lm.backbone):
        layer.lora_kernel_b.assign(0.3 * rng.normal(size=layer.lora_kernel_b.shape))
    lm.save_peft_adapter(tmp_path / "ours")
    config = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert targets in (None, config.target_modules)
    model = hybrids.random_model(NAME)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):  # and the weights have none: test_hybrids.py
            module.time_step_limit = (0.0, float("inf"))
    base = hybrids.logits(model, IDS)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    truth = hybrids.logits_in_float64(model, IDS)
    theirs, found = hybrids.logits(model, IDS), logits_of(lm)
    assert rms(found - truth) <= 2 * rms(theirs - truth)
    assert rms(found - base) > 0.02 * rms(truth)
    lm.backbone.merge_lora()
    lm.load_peft_adapter(tmp_path / "ours")


def test_places_that_differ_are_refused(lm, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(hybrids.random_model(NAME), config)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "lora_" in path:
                weight.copy_(torch.randn(weight.shape))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"The adapter of .*q_proj differs from that of .*q_proj"):
        lm.load_peft_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    begin = {name.partition("shared_transformer")[0] for name in tensors}
    first = {name: t for name, t in tensors.items() if name.startswith(min(begin))}
    save_file(first, file)
    lm.load_peft_adapter(tmp_path)  # of a file with the first place alone
    assert len(lora.adapted_projections(lm.backbone)) == 1


def test_patterns_may_name_modules_as_a_checkpoints_own_code_does(tmp_path):
    """`backbone.` of NVIDIA's code is `model.` in transformers."""
    name = "nemotron, no bias"
    hybrids.random_model(name).save_pretrained(tmp_path / "base")
    lm = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "base", preprocessor=None)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["in_proj"])
    peft.get_peft_model(hybrids.random_model(name), config).save_pretrained(tmp_path / "adapter")
    [first, *_] = (line.path for line in lm.backbone._flatten_layers() if line.name == "in_proj")
    number = first.split("/")[0].removeprefix("block_")
    file = tmp_path / "adapter" / "adapter_config.json"
    for begin in ("backbone", "model"):
        patterns = {"alpha_pattern": {f"{begin}.layers.{number}.mixer.in_proj": 32}}
        file.write_text(json.dumps({**json.loads(file.read_text()), **patterns}))
        lm.load_peft_adapter(tmp_path / "adapter")
        alphas = {line.path: line.lora_alpha for line in lora.adapted_projections(lm.backbone)}
        assert alphas.pop(first) == 32
        assert set(alphas.values()) <= {4}
        lm.backbone.merge_lora()
