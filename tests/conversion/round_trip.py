"""Loads a checkpoint and exports it again, and tells what that took: FOLDER EXPORTED."""

import ctypes
import json
import pathlib
import re
import sys
import time

import numpy as np

import keras_mamba2

TOKEN_IDS = np.random.default_rng(0).integers(0, 50277, (1, 24))


def peak_bytes() -> int:
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


def main(folder: str, exported: str) -> None:
    # What JAX takes once and for all is not the model's.
    keras_mamba2.Mamba2Backbone(8, 1, 8, head_dim=4, state_dim=4)
    before, begun = peak_bytes(), time.perf_counter()
    lm = keras_mamba2.Mamba2CausalLM.from_preset(folder, preprocessor=None)
    took = {"load_s": time.perf_counter() - begun, "load_bytes": peak_bytes() - before}
    took["model_bytes"] = 4 * lm.count_params()
    begun = time.perf_counter()
    lm.export_to_transformers(exported)
    took |= {"export_s": time.perf_counter() - begun, "both_bytes": peak_bytes() - before}
    lm.compile(sampler="greedy")
    prompt = {"token_ids": TOKEN_IDS, "padding_mask": np.ones_like(TOKEN_IDS)}
    state = lm.prefill(prompt)
    for _ in range(2):  # the first compiles, which takes memory of its own
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        lm.generate(prompt, stop_token_ids=None, max_new_tokens=8)
    took |= {"generate_bytes": peak_bytes() - before, "state_bytes": state.nbytes}
    logits = lm({"token_ids": TOKEN_IDS, "padding_mask": np.ones_like(TOKEN_IDS)})
    np.save(f"{exported}/logits.npy", np.asarray(logits))
    print(json.dumps(took))


if __name__ == "__main__":
    main(*sys.argv[1:])
