"""Small models of transformers with random weights, saved in both formats."""

import collections
import copy
import json
import math
from unittest import mock

import numpy as np
import torch
import transformers

import keras_mamba2
from keras_mamba2 import conversion
from keras_mamba2.preset_files import read_json

# What differs from `SMALL`, by name.
GRID = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"use_bias": True},
    "no_conv_bias": {"use_conv_bias": False},
    "expand_1.5": {"expand": 1.5, "num_heads": 3},
    "kernel_3": {"conv_kernel": 3},
    "odd_heads": {"hidden_size": 15, "num_heads": 6, "head_dim": 5},
    "groups": {"n_groups": 2},
    "limits": {"time_step_limit": (0.02, 0.3)},
    "low_limit": {"time_step_limit": (0.02, math.inf)},
}
SMALL = {
    "num_heads": 4,
    "head_dim": 8,
    "vocab_size": 48,
    "hidden_size": 16,
    "state_size": 8,
    "num_hidden_layers": 2,
    "n_groups": 1,
    "chunk_size": 16,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def random_model(name: str = "plain", seed: int = 0, **changes):
    """A `Mamba2ForCausalLM` in float32, with weights of a trained model's size."""
    arguments = {**SMALL, **GRID[name], **changes}
    odd = {}
    if arguments.get("expand", 2) != 2:
        # transformers refuses what its versions before 5 took, and its model still computes.
        odd = {key: arguments.pop(key) for key in ("expand", "num_heads")}
        arguments["num_heads"] = 4
    config = transformers.Mamba2Config(**arguments)
    config.__dict__.update(odd)
    model = transformers.Mamba2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            weight.copy_(_random(path, weight.shape, generator))
    return model


def _random(path, shape, generator):
    if path.endswith("A_log"):
        return torch.log(1 + 15 * torch.rand(shape, generator=generator))
    if path.endswith("dt_bias"):
        return -4 * torch.rand(shape, generator=generator)
    if "norm" in path:
        return 0.5 + torch.rand(shape, generator=generator)
    scale = shape[1] ** -0.5 if path.endswith("proj.weight") else 0.5
    return scale * torch.randn(shape, generator=generator)


def save_transformers(model, folder, max_shard_size="5GB"):
    if model.config.expand == int(model.config.expand):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder
    from safetensors.torch import save_file

    folder.mkdir()
    state = model.state_dict()
    del state["lm_head.weight"]  # tied
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def save_state_spaces(model, folder, unpadded=None):
    """The format of the original code, with rows of the vocabulary that are padding."""
    folder.mkdir()
    config = model.config
    ssm = {
        "layer": "Mamba2",
        "d_state": config.state_size,
        "headdim": config.head_dim,
        "ngroups": config.n_groups,
        "expand": config.expand,
        "d_conv": config.conv_kernel,
        "bias": config.use_bias,
        "conv_bias": config.use_conv_bias,
        "dt_limit": config.time_step_limit,
    }
    original = {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size - 3 if unpadded is None else unpadded,
        "pad_vocab_size_multiple": 16,
        "ssm_cfg": ssm,
        "tie_embeddings": config.tie_word_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(original))
    state = collections.OrderedDict(
        (name.replace("embeddings.", "embedding."), tensor)
        for name, tensor in model.state_dict().items()
    )
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def load(folder, **kwargs):
    config = read_json(folder / "config.json")
    backbone = keras_mamba2.Mamba2Backbone(**conversion.constructor_arguments(config), **kwargs)
    conversion.load_weights(backbone, folder)
    return backbone


def weights_of(backbone):
    return {v.path: np.asarray(v.numpy()) for v in backbone.weights}


def assert_same_weights(backbone, other):
    weights, others = weights_of(backbone), weights_of(other)
    assert list(weights) == list(others)
    for path, value in weights.items():
        assert value.dtype == others[path].dtype, path
        assert value.tobytes() == others[path].tobytes(), path


def token_ids():
    return np.random.default_rng(0).integers(0, 45, (2, 37))


def logits_of(backbone):
    ids = token_ids()
    x = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    return np.asarray(backbone.token_embedding(x, reverse=True), np.float64)


def torch_logits(model, ids=None):
    ids = token_ids() if ids is None else ids
    with torch.no_grad():
        return model(torch.from_numpy(ids), use_cache=False).logits.numpy()


def torch_logits_in_float64(model, ids=None):
    """In float64 throughout: also where the code of transformers says float32."""
    model = copy.deepcopy(model).double()
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        logits = torch_logits(model, ids)
    assert logits.dtype == np.float64
    return logits
