"""Loads a checkpoint and exports it again, and tells what that took: FOLDER EXPORTED."""

import json
import resource
import sys
import time

import numpy as np

import keras_mamba2

TOKEN_IDS = np.random.default_rng(0).integers(0, 50277, (1, 24))


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
    logits = lm({"token_ids": TOKEN_IDS, "padding_mask": np.ones_like(TOKEN_IDS)})
    np.save(f"{exported}/logits.npy", np.asarray(logits))
    print(json.dumps(took))


if __name__ == "__main__":
    main(*sys.argv[1:])
