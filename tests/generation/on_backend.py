"""What generation gives on the backend of this process, and a step of training.

`python -m tests.generation.on_backend KIND FOLDER`, of `pure` and `hybrid`
"""

import json
import sys
import tempfile

import keras
import numpy as np

import keras_mamba2

PROMPTS = ["to be", "or not to be, that is the question"]


def results(folder) -> dict:
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder)
    lm.compile(sampler="greedy")
    found = generated(lm)
    pieces = lm.stream(PROMPTS, max_new_tokens=8)
    found["streamed"] = ["".join(row) for row in zip(*pieces, strict=True)]
    lm.generate(PROMPTS, max_new_tokens=8, temperature=0.5)
    found["after a temperature"] = lm.generate(PROMPTS, max_new_tokens=8)
    found["several"] = lm.generate("to be", max_new_tokens=8, num_return_sequences=2)
    found["perplexity"] = lm.perplexity(PROMPTS)
    session = lm.start("to be")
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        session.save(file.name)
        found["resumed"] = lm.resume(file.name).generate(max_new_tokens=8)
    lm.compile(sampler=keras_mamba2.FilterSampler(temperature=0, repetition_penalty=1e6))
    found["filtered"] = lm.generate(PROMPTS, max_new_tokens=8)
    # Draws differ from backend to backend, but not from call to call.
    for sampler in ("top_k", keras_mamba2.FilterSampler(top_p=0.9, min_p=0.01)):
        lm.compile(sampler=sampler)
        drawn = [lm.generate(PROMPTS, max_new_tokens=8, seed=1) for _ in range(2)]
        assert drawn[0] == drawn[1]
    backbone = keras_mamba2.Mamba2CausalLM(lm.backbone)
    backbone.compile(sampler="beam")
    token_ids = np.array([[7, 8, 9, 0, 0], [1, 2, 3, 4, 0]])
    inputs = {"token_ids": token_ids, "padding_mask": token_ids > 0}
    found["beam"] = backbone.generate(inputs, stop_token_ids=None)["token_ids"].tolist()
    lm.quantize("int8")
    lm.compile(sampler="greedy")
    found["int8"] = lm.generate(PROMPTS, max_new_tokens=8)
    lm.backbone.enable_lora(2)
    lm.compile(optimizer="sgd", weighted_metrics=[])
    found["int8 loss"] = lm.fit(PROMPTS, batch_size=2, verbose=0).history["loss"][0]
    return found


def generated(lm) -> dict:
    """Of random weights texts hold control characters, which JSON takes."""
    state = lm.prefill(["to ", "or not to be, that "])
    more = lm.generate(["be", "is the question"], state=state, max_new_tokens=8)
    return {"ragged": lm.generate(PROMPTS, max_new_tokens=8), "continued": more}


def results_of_hybrid(folder) -> dict:
    """Of a model with every kind of layer: in a graph, and with lengths that are not known."""
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder)
    lm.compile(sampler="greedy")
    found = generated(lm)
    rng = np.random.default_rng(0)
    token_ids = rng.integers(1, 250, (2, 24))
    inputs = {"token_ids": token_ids, "padding_mask": np.arange(24) < [[24], [19]]}
    packed = {**inputs, "segment_ids": np.arange(24)[None] // np.array([[7], [5]])}
    for name, x in (("rows", inputs), ("packed", packed)):
        found[name] = np.asarray(keras.ops.convert_to_numpy(lm(x)))[0, ::5, :9].tolist()
    for remat in (False, True):
        config = lm.get_config()
        config["backbone"]["config"]["remat"] = remat
        again = keras_mamba2.Mamba2CausalLM.from_config(config)
        again.set_weights(lm.get_weights())
        again.compile(optimizer=keras.optimizers.SGD(0.1), weighted_metrics=[])
        rows = packed, np.roll(token_ids, -1, axis=1), np.ones((2, 24))
        losses = again.fit(*rows[:2], sample_weight=rows[2], epochs=2, verbose=0).history["loss"]
        found[f"loss, remat={remat}"] = losses
    return found


if __name__ == "__main__":
    kind, folder = sys.argv[1:]
    print(json.dumps({"pure": results, "hybrid": results_of_hybrid}[kind](folder)))
