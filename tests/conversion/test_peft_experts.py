"""Adapters of experts between `peft`, where they are those of parameters, and here."""

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

import keras_mamba2
from tests.conversion import hybrids

pytestmark = [
    # `peft` asks transformers in a way of before.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    # It looks for those of parameters among modules, and uses them all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

NEMOTRON, GRANITE = "nemotron, experts", "granite, experts"
UP, DOWN = "mixer.experts.up_proj", "mixer.experts.down_proj"
# A model, and fields of `peft.LoraConfig`.
CASES = {
    "both": (
        NEMOTRON,
        {
            "target_modules": ["q_proj", "o_proj"],
            "target_parameters": [UP, DOWN],
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {r"layers\.1\.mixer\.experts\.up_proj": 7},
        },
    ),
    "one": (NEMOTRON, {"target_modules": [], "target_parameters": [UP]}),
    "one of a layer": (
        NEMOTRON,
        {"target_modules": [], "target_parameters": [f"model.layers.3.{DOWN}"], "use_rslora": True},
    ),
    "granite": (
        GRANITE,
        {"target_modules": ["k_proj"], "target_parameters": ["experts.down_proj"]},
    ),
}
IDS = np.random.default_rng(0).integers(1, 60, size=(2, 12))


def peft_model(name, **fields):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 2, "lora_alpha": 3, **fields})
    model = peft.get_peft_model(hybrids.random_model(name), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "lora_" in path:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    for name in (NEMOTRON, GRANITE):
        hybrids.random_model(name).save_pretrained(path / name[:4])
    return {name: path / name[:4] for name in (NEMOTRON, GRANITE)}


def load(folders, name):
    return keras_mamba2.Mamba2CausalLM.from_preset(folders[name], preprocessor=None)


def logits_of(lm):
    variables = lm.trainable_variables, lm.non_trainable_variables
    values = [[v.value for v in kind] for kind in variables]
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    return np.asarray(jax.jit(lm.stateless_call)(*values, inputs)[0], np.float64)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_and_back(case, folders, tmp_path):
    name, fields = CASES[case]
    model = peft_model(name, **fields)
    model.save_pretrained(tmp_path / "theirs")
    lm = load(folders, name)
    base = logits_of(lm)
    lm.load_peft_adapter(tmp_path / "theirs")
    theirs = hybrids.logits(model, IDS)
    truth = hybrids.logits_in_float64(model.merge_and_unload(), IDS)
    found = logits_of(lm)
    assert np.abs(found - truth).max() <= 4 * np.abs(theirs - truth).max()
    assert np.abs(found - base).max() > 0.02 * np.abs(truth).max()

    lm.save_peft_adapter(tmp_path / "ours")
    files = [tmp_path / each / "adapter_model.safetensors" for each in ("theirs", "ours")]
    theirs_tensors, ours = map(load_file, files)
    assert theirs_tensors.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs_tensors.items())
    again = peft.PeftModel.from_pretrained(hybrids.random_model(name), tmp_path / "ours").eval()
    np.testing.assert_allclose(hybrids.logits(again, IDS), theirs, rtol=1e-5, atol=1e-5)


def test_gate_and_up_of_granite_are_one_matrix_in_peft(folders, tmp_path):
    """Which has one adapter there, and two here."""
    lm = load(folders, GRANITE)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    peft_model(GRANITE, target_modules=[], target_parameters=targets).save_pretrained(
        tmp_path / "theirs"
    )
    with pytest.raises(ValueError, match=r"Without a place: .*sparse_moe\.experts\.base_layer"):
        lm.load_peft_adapter(tmp_path / "theirs")
    lm.backbone.enable_lora(2, ["experts_up"])
    with pytest.raises(ValueError, match=r"is a part of '.*\.experts\.gate_up_proj' in transform"):
        lm.save_peft_adapter(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
