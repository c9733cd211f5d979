"""GGUF files of transformers' models, and what llama.cpp computes from them."""

import json
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import keras_mamba2
from benchmarks import gguf_tensors
from benchmarks import hybrids as benchmark
from tests.conversion import hybrids

# Of the tests' small models those that llama.cpp can compute, with what has to change for it.
CASES = {
    "granite": {},
    "granite, experts": {},
    "falcon": {},
    "falcon, norm after gate": {"attention_bias": False},
}
cases = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Writes a random model into the folder that it returns."""

    def save(name, **changes):
        family, arguments = hybrids.CASES[name]
        monkeypatch.setitem(hybrids.CASES, name, (family, arguments | changes))
        hybrids.random_model(name).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def gguf_tensors_of(folder):
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    return config, weights, dict(gguf_tensors.tensors(config, weights.items()))


@cases
def test_every_weight_has_its_place(name, save):
    config, weights, found = gguf_tensors_of(save(name, **CASES[name]))
    assert sum(a.size for a in found.values()) == sum(a.size for a in weights.values())
    blocks = {key.split(".")[1] for key in found if key.startswith("blk.")}
    assert blocks == set(map(str, range(config["num_hidden_layers"])))


def test_gate_and_up_are_two_matrices_in_llama_cpp(save):
    _, weights, found = gguf_tensors_of(save("granite, experts"))
    both = weights["model.layers.0.block_sparse_moe.input_linear.weight"]  # (experts, 2 f, d)
    parts = found["blk.0.ffn_gate_exps.weight"], found["blk.0.ffn_up_exps.weight"]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), both)


def test_multipliers_of_falcon_are_in_the_weights(save):
    config, weights, found = gguf_tensors_of(save("falcon"))
    z, x, B, C, dt = config["ssm_multipliers"]
    rows = found["blk.1.ssm_in.weight"] / weights["model.layers.1.mamba.in_proj.weight"]
    inner, bc, heads = 48, 2 * 16, 6
    expected = 1.25 * np.repeat([z, x, B, C, dt], [inner, inner, bc, bc, heads])
    np.testing.assert_allclose(rows, np.broadcast_to(expected[:, None], rows.shape), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bamba", {}, "No GGUF file of `model_type` 'bamba'. Expected: mamba2, granite"),
        ("granite", {"position_embedding_type": "rope"}, "position_embedding_type='nope' only"),
        ("granite", {"mamba_expand": 4, "mamba_n_heads": 16}, "mamba_expand=2 only. Received: 4"),
        ("granite", {"attention_bias": True}, "no weight for 'model.layers.1.self_attn.k_proj.b"),
        ("falcon", {"tie_word_embeddings": True}, "tie_word_embeddings=False only. Received: True"),
        ("falcon, norm before gate", {}, "mamba_norm_before_gate=False only. Received: True"),
        ("falcon", {"time_step_limit": (0.1, 0.3)}, r"time_step_limit.* Received: \[0.1, 0.3\]"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(name, changes, message, save):
    with pytest.raises(ValueError, match=message):
        gguf_tensors_of(save(name, **changes))


@pytest.mark.llama_cpp
@pytest.mark.skipif(not find_spec("llama_cpp"), reason="no llama-cpp-python")
@pytest.mark.slow
@cases
def test_llama_cpp_computes_what_we_compute(name, save):
    from benchmarks.gguf_file import write_gguf
    from benchmarks.llama_cpp_model import LlamaCpp

    folder = save(name, **CASES[name])
    write_gguf(folder, folder / "model.gguf")
    model = LlamaCpp(folder / "model.gguf")
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder, preprocessor=None)
    prompt = np.random.default_rng(0).integers(64, size=(2, 20))
    model.start(2, max_tokens=64)
    tokens, logits = [prompt], []
    for _ in range(32):
        logits.append(model.advance(tokens[-1]))
        tokens.append(logits[-1].argmax(-1)[:, None])
    tokens = np.concatenate(tokens, axis=1)
    inputs = {"token_ids": prompt, "padding_mask": np.ones_like(prompt)}
    lm.compile(sampler="greedy")
    ours = lm.generate(inputs, max_new_tokens=32, stop_token_ids=None)
    np.testing.assert_array_equal(ours["token_ids"], tokens)
    expected = np.asarray(jax.jit(lm.score)(tokens[:, :-1]))[:, 19:]
    difference = np.abs(np.stack(logits, axis=1) - expected).max()
    # One percent of a single multiplier or decay is thirty times as much, or more.
    assert difference < 16 * np.finfo("float32").eps * np.abs(expected).max()


@pytest.mark.slow
def test_hybrids_are_measured_beside_their_peers(save, tmp_path):
    file = tmp_path / "found.json"
    folder = str(save("granite"))
    benchmark.main([folder], prompt_tokens=8, new_tokens=2, rounds=1, file=file)
    found = json.loads(file.read_text())["presets"][folder]
    peers = {"transformers", *(["llama.cpp"] if benchmark.has_llama_cpp() else [])}
    for figures in found.values():
        ratios = figures.pop("ratio")
        assert set(ratios) == peers
        assert ratios == {peer: figures[peer] / figures["keras_mamba2"] for peer in peers}
