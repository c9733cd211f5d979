"""The backbone and transformers' Mamba-2, with the same random weights, against float64."""

import functools
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_mamba2 import Mamba2Backbone
from tests import reference

EPS = np.finfo(np.float32).eps
# Of our arguments, and the length; between them every argument that changes the computation.
CASES = {
    "odd length": ({}, 13),
    "one token": ({}, 1),
    "whole chunks": ({"expansion": 1, "head_dim": 8, "conv_kernel_size": 3}, 16),
    "biases": ({"use_bias": True, "use_conv_bias": False, "layer_norm_epsilon": 1e-3}, 9),
    "time_step_limit": ({"time_step_limit": (0.02, 0.2), "chunk_size": 5}, 13),
    "groups": ({"num_groups": 4, "chunk_size": 64}, 17),
}
cases = pytest.mark.parametrize("case", CASES)


def random_backbone(**arguments):
    sizes = {"hidden_dim": 64, "state_dim": 16, "head_dim": 16, "chunk_size": 8}
    backbone = Mamba2Backbone(vocabulary_size=50, num_layers=3, **{**sizes, **arguments})
    reference.randomize(backbone)
    return backbone


def random_ids(length):
    return np.random.default_rng(3).integers(50, size=(2, length)).astype("int32")


def truth_of(backbone, ids):
    config = backbone.blocks[0].mixer.get_config() | backbone.get_config()
    return reference.backbone(ids, reference.weights_of(backbone), config)


@functools.cache
def example(case):
    arguments, length = CASES[case]
    backbone, ids = random_backbone(**arguments), random_ids(length)
    return backbone, ids, truth_of(backbone, ids)[0]


def compiled(f):
    if keras.config.backend() != "jax":
        return f
    import jax

    return jax.jit(f)


def transformers_model(backbone):
    """A `transformers.Mamba2Model` with the weights of `backbone`."""
    import torch
    from transformers import Mamba2Config
    from transformers import Mamba2Model

    low, high = backbone.time_step_limit
    model = Mamba2Model(
        Mamba2Config(
            vocab_size=backbone.vocabulary_size,
            num_hidden_layers=backbone.num_layers,
            hidden_size=backbone.hidden_dim,
            state_size=backbone.state_dim,
            head_dim=backbone.head_dim,
            num_heads=backbone.blocks[0].mixer.num_heads,
            n_groups=backbone.num_groups,
            expand=backbone.expansion,
            conv_kernel=backbone.conv_kernel_size,
            chunk_size=backbone.chunk_size,
            use_bias=backbone.use_bias,
            use_conv_bias=backbone.use_conv_bias,
            layer_norm_epsilon=backbone.layer_norm_epsilon,
            time_step_limit=(low, float("inf") if high is None else high),
        )
    )
    state_dict = {}
    for path, value in reference.weights_of(backbone).items():
        if path.endswith("conv_kernel"):
            value = value.T[:, None]  # (k c) -> (c 1 k)
        elif path.endswith("/kernel"):
            value = value.T  # (in out) -> (out in)
        state_dict[transformers_name(path)] = torch.from_numpy(value.copy())
    model.load_state_dict(state_dict)  # strict: no weight is left over on either side
    return model.eval()


def transformers_name(path):
    for pattern, name in {
        "token_embedding/embeddings": "embeddings.weight",
        "final_norm/scale": "norm_f.weight",
        r"block_(\d+)": r"layers.\1",
        "conv_kernel": "conv1d.weight",
        "conv_bias": "conv1d.bias",
        "(kernel|scale)$": "weight",
        "/": ".",
    }.items():
        path = re.sub(pattern, name, path)
    return path


def hidden_states(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids).long(), use_cache=False)[0].double().numpy()


@cases
def test_the_reference_is_transformers_in_float64(case, monkeypatch):
    import torch

    backbone, ids, truth = example(case)
    model = transformers_model(backbone).double()
    # It computes norms, decays and states in float32 by name. Here these names mean float64.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    error = np.abs(hidden_states(model, ids) - truth).max()
    assert error <= 1e-12 * np.abs(truth).max()


@cases
def test_float32_is_as_close_to_the_truth_as_transformers(case):
    backbone, ids, truth = example(case)
    theirs = np.abs(hidden_states(transformers_model(backbone), ids) - truth).max()
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    ours = ops.convert_to_numpy(compiled(backbone)(inputs)).astype(np.float64)
    ours = np.abs(ours - truth).max()
    assert ours <= 2 * theirs


def padded(ids, length):
    """The first row padded on the right, the second on the left: ids and mask."""
    t = ids.shape[1]
    padded_ids, mask = np.full((2, length), 7, "int32"), np.zeros((2, length), "int32")
    padded_ids[0, :t], padded_ids[1, -t:] = ids
    mask[0, :t] = mask[1, -t:] = 1
    return padded_ids, mask


def assert_close(actual, truth):
    # Three blocks of some ten operations after one another.
    assert np.abs(actual - truth).max() <= 64 * EPS * np.abs(truth).max()


def test_padding_changes_nothing():
    backbone, ids, truth = example("groups")
    padded_ids, mask = padded(ids, 21)
    y = compiled(backbone)({"token_ids": padded_ids, "padding_mask": mask})
    assert_close(ops.convert_to_numpy(y)[mask == 1].reshape(truth.shape), truth)


def test_a_padded_prefix_and_steps_are_the_whole():
    backbone, ids = random_backbone(num_groups=2), random_ids(9)
    truth, true_states = truth_of(backbone, ids)
    padded_ids, mask = padded(ids[:, :5], 7)
    y, state = compiled(backbone.call_with_state)(padded_ids, padding_mask=mask)
    y = ops.convert_to_numpy(y)[mask == 1].reshape(2, 5, -1)
    ys, step = list(np.moveaxis(y, 1, 0)), compiled(backbone.step)
    for i in range(5, 9):
        y, state = step(ids[:, i], state)
        ys.append(ops.convert_to_numpy(y))
    assert_close(np.stack(ys, axis=1), truth)
    for layer, true_layer in zip(state.layers, true_states, strict=True):
        for part, true_part in zip(layer, true_layer, strict=True):
            assert_close(ops.convert_to_numpy(part), true_part)
