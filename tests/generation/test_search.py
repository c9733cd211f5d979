"""Beam and contrastive search against searches written out over whole forward passes."""

import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_mamba2

MAX_LENGTH = 16
PROMPTS = [[5, 77, 120, 3], [9, 9, 200], [31, 2, 64, 250, 18, 7]]


@pytest.fixture(scope="module")
def lm(preset_folder):
    return keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)


def forward(lm, sequences):
    """Log probabilities at the last position `(b v)`, and all hidden states `(b t d)`."""
    token_ids = np.zeros((len(sequences), MAX_LENGTH), "int32")
    for row, sequence in zip(token_ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    hidden_states, _ = lm.backbone.call_with_state(token_ids)
    last = np.array([len(sequence) - 1 for sequence in sequences])
    logits = lm.backbone.token_embedding(hidden_states, reverse=True)
    logits = np.asarray(ops.convert_to_numpy(logits), "float64")[np.arange(len(last)), last]
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_probs, np.asarray(ops.convert_to_numpy(hidden_states), "float64")


def beam_search(lm, prompt, num_beams):
    beams = [(0.0, list(prompt))]
    while len(beams[0][1]) < MAX_LENGTH:
        log_probs, _ = forward(lm, [sequence for _, sequence in beams])
        candidates = [
            (total + log_probs[i, token], [*sequence, token])
            for i, (total, sequence) in enumerate(beams)
            for token in np.argsort(-log_probs[i])[:num_beams].tolist()
        ]
        beams = sorted(candidates, key=lambda beam: -beam[0])[:num_beams]
    return beams[0][1]


def contrastive_search(lm, prompt, k, alpha):
    sequence = list(prompt)
    while len(sequence) < MAX_LENGTH:
        log_probs, _ = forward(lm, [sequence])
        candidates = np.argsort(-log_probs[0])[:k].tolist()
        _, hidden = forward(lm, [[*sequence, token] for token in candidates])
        hidden /= np.linalg.norm(hidden, axis=-1, keepdims=True)
        t = len(sequence)
        similarity = (hidden[:, :t] @ hidden[:, t, :, None])[..., 0].max(axis=1)
        scores = (1 - alpha) * np.exp(log_probs[0, candidates]) - alpha * similarity
        sequence.append(candidates[int(scores.argmax())])
    return sequence


def generate(lm, prompts, **kwargs):
    lengths = np.array([len(prompt) for prompt in prompts])
    token_ids = np.zeros((len(prompts), MAX_LENGTH), "int32")
    for row, prompt in zip(token_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    inputs = {"token_ids": token_ids, "padding_mask": np.arange(MAX_LENGTH) < lengths[:, None]}
    found = lm.generate(inputs, stop_token_ids=None, **kwargs)
    rows = zip(found["token_ids"], found["padding_mask"], strict=True)
    return [row[mask].tolist() for row, mask in rows]


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search(lm, num_beams):
    lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=num_beams))
    expected = [beam_search(lm, prompt, num_beams) for prompt in PROMPTS]
    assert generate(lm, PROMPTS) == expected


def test_contrastive_search(lm):
    lm.compile(sampler=keras_hub.samplers.ContrastiveSampler(k=4, alpha=0.4))
    expected = [contrastive_search(lm, prompt, 4, 0.4) for prompt in PROMPTS]
    assert generate(lm, PROMPTS) == expected


@pytest.mark.parametrize("sampler", ["greedy", "top_k", "top_p", "random", "beam", "contrastive"])
def test_a_row_does_not_depend_on_what_is_beside_it(lm, sampler):
    """With a fixed seed the draws of a row depend on its place, so it keeps that."""
    if sampler == "contrastive":
        sampler = keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.3)
    lm.compile(sampler=sampler)
    inputs = [[[1, 2, 3], [4]], [[1, 2, 3], [8, 9, 10, 11, 12]]]
    first, second = (generate(lm, prompts, max_new_tokens=8, seed=4) for prompts in inputs)
    assert first[0] == second[0]


def test_a_row_that_has_stopped_does_not_change(lm):
    """Beams of a row would go on until those of all rows have stopped."""
    lm.compile(sampler="beam")
    rng = np.random.default_rng(0)
    token_ids, stops = rng.integers(1, 20, (6, 3)).astype("int32"), list(range(0, 256, 3))
    found = []
    for rows in ([0, 1, 2, 3, 4, 5], *[[i] for i in range(6)]):
        inputs = {"token_ids": token_ids[rows], "padding_mask": np.ones((len(rows), 3), "int32")}
        result = lm.generate(inputs, stop_token_ids=stops, max_new_tokens=12)
        pairs = zip(result["token_ids"], result["padding_mask"], strict=True)
        found.append([row[mask.astype(bool)].tolist() for row, mask in pairs])
    together, *alone = found
    assert together == [row for [row] in alone]
    assert len(set(map(len, together))) > 1
