"""Random weights on disk, the same for all subjects: `python -m benchmarks.checkpoint FOLDER`.

A folder in the format of transformers, from which keras_mamba2 reads too, and beside it the same
weights as GGUF files of several types, where llama.cpp is installed.
"""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from safetensors.numpy import save_file

from benchmarks.workload import FULL
from benchmarks.workload import Workload

GGUF_TYPES = {"bfloat16": "BF16", "Q8_0": "Q8_0"}  # by `Workload.dtype`
MATRIX_SCALE = 0.02


def main(
    folder: Path,
    changes: Annotated[str, typer.Option(help="of the workload's fields, as JSON")] = "{}",
):
    workload = replace(FULL, **json.loads(changes))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(transformers_config(workload)))
    save_file(dict(random_weights(workload)), folder / "model.safetensors", {"format": "pt"})
    if find_spec("llama_cpp") and find_spec("gguf"):
        from benchmarks.gguf_file import write_gguf

        for name, kind in GGUF_TYPES.items():
            write_gguf(folder, folder / f"{name}.gguf", kind)


def transformers_config(workload: Workload) -> dict:
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "tie_word_embeddings": True,
        "num_heads": workload.num_heads,
        "n_groups": 1,
        **hugging_face_names(workload),
    }


def hugging_face_names(workload: Workload) -> dict[str, int]:
    return {
        "vocab_size": workload.vocabulary_size,
        "num_hidden_layers": workload.num_layers,
        "hidden_size": workload.hidden_dim,
        "state_size": workload.state_dim,
        "head_dim": workload.head_dim,
        "conv_kernel": workload.conv_kernel_size,
    }


def random_weights(workload: Workload):
    """Yields names of transformers and float32 arrays, as a new model might have them."""
    d, e, n, h, k = workload.letters()
    rng = np.random.default_rng(0)

    def matrix(*shape):
        return MATRIX_SCALE * rng.standard_normal(shape, dtype="float32")

    yield "backbone.embeddings.weight", matrix(workload.vocabulary_size, d)
    for i in range(workload.num_layers):
        block = f"backbone.layers.{i}."
        yield f"{block}norm.weight", np.ones(d, "float32")
        yield f"{block}mixer.A_log", np.log(rng.uniform(1, 16, h)).astype("float32")
        yield f"{block}mixer.D", np.ones(h, "float32")
        yield f"{block}mixer.dt_bias", rng.uniform(-7, -2, h).astype("float32")
        yield f"{block}mixer.conv1d.weight", matrix(e + 2 * n, 1, k)
        yield f"{block}mixer.conv1d.bias", matrix(e + 2 * n)
        yield f"{block}mixer.in_proj.weight", matrix(2 * e + 2 * n + h, d)
        yield f"{block}mixer.norm.weight", np.ones(e, "float32")
        yield f"{block}mixer.out_proj.weight", matrix(d, e)
    yield "backbone.norm_f.weight", np.ones(d, "float32")


if __name__ == "__main__":
    typer.run(main)
