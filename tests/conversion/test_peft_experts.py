"""Adapters of experts between `peft`, where they are those of parameters, and here."""

import copy
import json

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

import keras_mamba2
from keras_mamba2.models import lora
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
    "granite, gate and up": (
        GRANITE,
        {
            "target_modules": ["input_linear"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"shared_mlp.input_linear": 3},
        },
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


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_and_back(case, folders, tmp_path):
    name, fields = CASES[case]
    model = peft_model(name, **fields)
    model.save_pretrained(tmp_path / "theirs")
    lm = load(folders, name)
    base = logits_of(lm)
    lm.load_peft_adapter(tmp_path / "theirs")
    theirs = hybrids.logits(model, IDS)
    truth = hybrids.logits_in_float64(copy.deepcopy(model).double().merge_and_unload(), IDS)
    found = logits_of(lm)
    assert np.abs(found - truth).max() <= 2 * np.abs(theirs - truth).max()
    assert np.abs(found - base).max() > 0.02 * np.abs(truth).max()

    lm.save_peft_adapter(tmp_path / "ours")
    files = [tmp_path / each / "adapter_model.safetensors" for each in ("theirs", "ours")]
    theirs_tensors, ours = map(load_file, files)
    assert theirs_tensors.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs_tensors.items())
    again = peft.PeftModel.from_pretrained(hybrids.random_model(name), tmp_path / "ours").eval()
    np.testing.assert_allclose(hybrids.logits(again, IDS), theirs, rtol=1e-5, atol=1e-5)


def new_values(lm, seed=2):
    rng = np.random.default_rng(seed)
    for layer in lora.adapted_projections(lm.backbone):
        for factor in (layer.lora_kernel_a, layer.lora_kernel_b):
            factor.assign(0.3 * rng.normal(size=factor.shape))


@pytest.mark.parametrize(
    ("names", "rank"),
    [
        (["experts_gate", "experts_up", "experts_down", "gate", "up"], 4),
        (["experts_up", "gate"], 2),
    ],
    ids=["both", "one of two"],
)
def test_gate_and_up_of_granite_are_one_matrix_in_peft(names, rank, folders, tmp_path):
    """With one adapter, which here is one of each, as soon as they are trained apart."""
    lm = load(folders, GRANITE)
    lm.backbone.enable_lora(2, names)
    new_values(lm)
    found = logits_of(lm)
    lm.save_peft_adapter(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    matrix = "model.layers.0.block_sparse_moe.experts.gate_up_proj"
    assert config["rank_pattern"].get(matrix, config["r"]) == rank
    model = peft.PeftModel.from_pretrained(hybrids.random_model(GRANITE), tmp_path / "ours").eval()
    theirs = hybrids.logits(model, IDS)
    truth = hybrids.logits_in_float64(model.double().merge_and_unload(), IDS)
    assert np.abs(found - truth).max() <= 2 * np.abs(theirs - truth).max()

    again = load(folders, GRANITE)
    again.load_peft_adapter(tmp_path / "ours")
    np.testing.assert_allclose(logits_of(again), found, rtol=1e-5, atol=1e-5)


def test_parts_with_scales_of_their_own_are_joined(folders, tmp_path):
    lm = load(folders, GRANITE)
    layers = [
        layer for layer in lora.projections(lm.backbone) if layer.name in ("gate", "experts_gate")
    ]
    others = [
        layer for layer in lora.projections(lm.backbone) if layer.name in ("up", "experts_up")
    ]
    alphas = {**dict.fromkeys(layers, (2, 3)), **dict.fromkeys(others, (3, 1))}
    lora.enable(lm.backbone, alphas)
    new_values(lm)
    lm.save_peft_adapter(tmp_path / "ours")
    again = load(folders, GRANITE)
    again.load_peft_adapter(tmp_path / "ours")
    np.testing.assert_allclose(logits_of(again), logits_of(lm), rtol=1e-5, atol=1e-5)


class ExpertsInModules(torch.nn.Module):
    """The experts of Nemotron 3 as older models have them, each with modules of its own."""

    def __init__(self, experts):
        super().__init__()
        matrices = zip(experts.up_proj, experts.down_proj, strict=True)
        for i, (up, down) in enumerate(matrices):
            expert = torch.nn.Module()
            expert.up_proj, expert.down_proj = self.linear(up), self.linear(down)
            self.add_module(str(i), expert)

    @staticmethod
    def linear(weight):
        layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
        layer.weight = torch.nn.Parameter(weight.detach().clone())
        return layer

    def forward(self, x, indices, weights):
        y = torch.zeros_like(x)
        for i, expert in self.named_children():
            weight = (weights * (indices == int(i))).sum(-1, keepdim=True).to(x.dtype)
            y = y + weight * expert.down_proj(torch.relu(expert.up_proj(x)).square())
        return y


def model_with_modules(monkeypatch):
    """`random_model` as `peft_model` takes it, whose experts are modules."""
    model = hybrids.random_model(NEMOTRON)
    for layer in model.model.layers:
        if hasattr(layer.mixer, "experts"):
            layer.mixer.experts = ExpertsInModules(layer.mixer.experts)
    monkeypatch.setattr(hybrids, "random_model", lambda name: model)


def test_each_expert_may_be_a_module(folders, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        model_with_modules(patched)
        model = peft_model(
            NEMOTRON,
            target_modules=r".*experts\.\d+\.(up|down)_proj|.*layers\.1\..*up_proj",
            alpha_pattern={r"experts\.\d+\.up_proj": 5},
            exclude_modules=r".*experts\.2\.down_proj",
        )
    model.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert any(".experts.3.up_proj.lora_A" in name for name in tensors)
    lm = load(folders, NEMOTRON)
    lm.load_peft_adapter(tmp_path / "theirs")
    theirs = hybrids.logits(model, IDS)
    truth = hybrids.logits_in_float64(model.double().merge_and_unload(), IDS)
    found = logits_of(lm)
    assert np.abs(found - truth).max() <= 2 * np.abs(theirs - truth).max()
    # What is written is for models that have all experts in one parameter.
    lm.save_peft_adapter(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(hybrids.random_model(NEMOTRON), tmp_path / "ours")
    np.testing.assert_allclose(hybrids.logits(again.eval(), IDS), theirs, rtol=1e-5, atol=1e-5)


def test_experts_of_several_ranks_are_refused(folders, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        model_with_modules(patched)
        experts = r".*experts\.\d+\.up_proj"
        model = peft_model(
            NEMOTRON, target_modules=experts, rank_pattern={r"experts\.1\.up_proj": 3}
        )
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must have one rank and one alpha.*\(2, 3\), \(3, 3\)"):
        load(folders, NEMOTRON).load_peft_adapter(tmp_path)


def test_where_step_sizes_are_small_transformers_differs(folders, tmp_path):
    """It raises those of Nemotron to `time_step_min`, which NVIDIA's kernels do not.

    An adapter of in_proj makes some that are smaller: 2e-4 in the logits here.
    """
    model = peft_model(NEMOTRON, target_modules=["in_proj"], target_parameters=[UP, DOWN])
    model.save_pretrained(tmp_path)
    lm = load(folders, NEMOTRON)
    lm.load_peft_adapter(tmp_path)
    found = logits_of(lm)
    errors = []
    for floor in (1e-3, 0.0):
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (floor, float("inf"))
        theirs = hybrids.logits(model, IDS)
        merged = copy.deepcopy(model).double().merge_and_unload()
        truth = hybrids.logits_in_float64(merged, IDS)
        errors.append(np.abs(found - truth).max() / np.abs(theirs - truth).max())
    assert errors[0] > 10
    assert errors[1] <= 2
