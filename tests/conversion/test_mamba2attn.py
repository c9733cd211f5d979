"""Checkpoints of the original code with attention in some layers, which transformers lacks."""

import json
import pathlib

import numpy as np
import pytest
import torch

import keras_mamba2
from keras_mamba2.conversion import load_weights
from tests import reference
from tests.conversion.checkpoints import assert_same_weights
from tests.hub_server import Hub
from tests.hub_server import point_client_to
from tests.hub_server import serving

EPS = np.finfo("float32").eps
CONFIG = {
    "d_model": 16,
    "n_layer": 3,
    "d_intermediate": 0,
    "vocab_size": 45,
    "pad_vocab_size_multiple": 16,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2},
    "attn_layer_idx": [1],
    "attn_cfg": {
        "causal": True,
        "d_conv": 4,
        "head_dim": 6,
        "num_heads": 4,
        "num_heads_kv": 2,
        "out_proj_bias": False,
        "qkv_proj_bias": False,
        "rotary_emb_dim": 4,
    },
    "tie_embeddings": True,
}


@pytest.fixture(scope="module")
def tensors():
    """What the original code would save: random weights under its names and in its shapes."""
    e, n, g, h, d = 32, 8, 2, 4, 16
    conv, qkv = e + 2 * g * n, (4 + 2 + 2) * 6
    shapes = {"backbone.embedding.weight": (48, d), "backbone.norm_f.weight": (d,)}
    for i in range(3):
        mixer = f"backbone.layers.{i}.mixer"
        shapes[f"backbone.layers.{i}.norm.weight"] = (d,)
        if i == 1:
            shapes |= {
                f"{mixer}.in_proj.weight": (qkv, d),
                f"{mixer}.conv1d.weight": (qkv, 1, 4),
                f"{mixer}.conv1d.bias": (qkv,),
                f"{mixer}.out_proj.weight": (d, 24),
            }
            continue
        shapes |= {
            f"{mixer}.in_proj.weight": (e + conv + h, d),
            f"{mixer}.conv1d.weight": (conv, 1, 4),
            f"{mixer}.conv1d.bias": (conv,),
            **{f"{mixer}.{name}": (h,) for name in ("A_log", "dt_bias", "D")},
            f"{mixer}.norm.weight": (e,),
            f"{mixer}.out_proj.weight": (d, e),
        }
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }
    return {**tensors, "lm_head.weight": tensors["backbone.embedding.weight"]}


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mamba2attn")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def truth_of(tensors, ids):
    """The model in float64, from the tensors and the configuration alone."""
    t = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    x = t["backbone.embedding.weight"][ids]
    for i in range(3):
        mixer = f"backbone.layers.{i}.mixer"
        normed = reference.gated_rms_normalization(x, t[f"backbone.layers.{i}.norm.weight"])
        weights = {
            "conv_kernel": t[f"{mixer}.conv1d.weight"][:, 0].T,
            "conv_bias": t[f"{mixer}.conv1d.bias"],
        }
        matrix, out = t[f"{mixer}.in_proj.weight"].T, t[f"{mixer}.out_proj.weight"].T
        if i == 1:
            parts = np.split(matrix, [24, 36], axis=1)
            weights |= {
                f"{name}/kernel": part
                for name, part in zip(("query", "key", "value"), parts, strict=True)
            }
            weights["output/kernel"] = out
            config = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
            config |= {"scale": None, "key_multiplier": 1.0, "rotary_dim": 4}
            config |= {"rope_max_wavelength": 10_000.0, "conv_kernel_size": 4}
            x = x + reference.attention(normed, weights, config)
            continue
        weights |= {name: t[f"{mixer}.{name}"] for name in ("A_log", "dt_bias", "D")}
        weights |= {"in_proj/kernel": matrix, "out_proj/kernel": out}
        weights["norm/scale"] = t[f"{mixer}.norm.weight"]
        config = {"state_dim": 8, "head_dim": 8, "num_groups": 2, "time_step_limit": (0.0, np.inf)}
        config |= {"layer_norm_epsilon": 1e-5, "gated_norm": "after_gate"}
        x = x + reference.mixer(normed, weights, config)[0]
    x = reference.gated_rms_normalization(x, t["backbone.norm_f.weight"])
    return x @ t["lm_head.weight"].T


@pytest.mark.slow
def test_logits_are_those_of_the_original(folder, tensors):
    backbone = keras_mamba2.Mamba2HybridBackbone.from_preset(folder)
    assert (backbone.vocabulary_size, backbone.unpadded_vocabulary_size) == (48, 45)
    ids = np.random.default_rng(0).integers(45, size=(2, 13))
    truth = truth_of(tensors, ids)
    x, _ = backbone.call_with_state(ids)
    assert np.abs(backbone.logits(x) - truth).max() <= 128 * EPS * np.abs(truth).max()


@pytest.mark.slow
def test_the_first_tokens_after_a_prompt_are_right(folder, tensors):
    """The original keeps the outputs of its convolution, where steps need its inputs."""
    backbone = keras_mamba2.Mamba2HybridBackbone.from_preset(folder)
    ids = np.random.default_rng(1).integers(45, size=(1, 9))
    truth = truth_of(tensors, ids)
    _, state = backbone.call_with_state(ids[:, :5], backbone.initial_state(1, 9))
    for i in range(5, 9):
        x, state = backbone.step(ids[:, i], state)
        assert np.abs(backbone.logits(x) - truth[:, i]).max() <= 128 * EPS * np.abs(truth).max()


def test_it_comes_from_a_hub_too(folder, tmp_path, monkeypatch):
    files = {file.name: file.read_bytes() for file in pathlib.Path(folder).iterdir()}
    with serving(Hub({"user/model": files})) as address:
        point_client_to(address, tmp_path / "cache", monkeypatch)
        found = keras_mamba2.Mamba2HybridBackbone.from_preset("hf://user/model")
    expected = keras_mamba2.Mamba2HybridBackbone.from_preset(folder)
    assert_same_weights(found, expected)


def test_it_is_no_model_of_transformers(folder, tmp_path):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder, preprocessor=None)
    with pytest.raises(ValueError, match="transformers has no model of such blocks"):
        lm.export_to_transformers(tmp_path / "exported")


def test_a_missing_projection_is_named(folder, tensors, tmp_path):
    backbone = keras_mamba2.Mamba2HybridBackbone.from_preset(folder)
    fewer = {k: v for k, v in tensors.items() if k != "backbone.layers.1.mixer.in_proj.weight"}
    torch.save(fewer, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=r"missing in the files: .*layers.1.mixer.in_proj.weight"):
        load_weights(backbone, tmp_path)
