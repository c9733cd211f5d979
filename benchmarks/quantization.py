"""What quantization costs in quality and saves in memory, on the embedded preset.

    PYTHONHASHSEED=0 python -m benchmarks.quantization input.txt

Keras picks where calibration starts in a text by the hash of a string, which PYTHONHASHSEED fixes.
"""

import gc
import json
import math
import os
import time
from datetime import UTC
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
import typer

import keras_mamba2

PRESET = "mamba2_tiny_shakespeare"
RESULTS = Path(__file__).parent / "results" / "quantization.json"
VALIDATION = 0.1  # the last part of the text, which the preset was not trained on
# Name -> dtype of the model that is loaded, mode of `quantize`.
VARIANTS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("float32", "int8"),
    "int4": ("float32", "int4"),
    "float8": ("float32", "float8"),
    "gptq": ("float32", "gptq"),
    "awq": ("float32", "awq"),
}
CALIBRATION = {"num_samples": 64, "sequence_length": 256, "group_size": 64}


def main(
    text: Annotated[Path, typer.Argument(help="the tiny Shakespeare text")],
    tokens: Annotated[
        int | None, typer.Option(help="of the validation text; all if not given")
    ] = None,
    variant: Annotated[list[str], typer.Option(help="repeatable")] = tuple(VARIANTS),
    file: Annotated[Path, typer.Option()] = Path(__file__).parent / "results" / "quantization.json",
):
    """Measures each variant, writes a JSON file and prints a table."""
    content = text.read_text("utf-8")
    cut = len(content) - round(VALIDATION * len(content))
    training, validation = content[:cut], content[cut:][:tokens]
    versions = {name: metadata.version(name) for name in ("jax", "keras", "keras-hub")}
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions,
        "preset": PRESET,
        "validation_characters": len(validation),
        "calibration": CALIBRATION,
        "hash_seed": os.environ.get("PYTHONHASHSEED"),
        "variants": {},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in variant:
        found["variants"][name] = measured(*VARIANTS[name], training, validation)
        print(name, found["variants"][name], flush=True)
        file.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found["variants"]))


def measured(dtype: str, mode: str | None, training: str, validation: str) -> dict:
    lm = keras_mamba2.Mamba2CausalLM.from_preset(PRESET, dtype=dtype)
    lm.compile(sampler="greedy")
    begun = time.perf_counter()
    if mode is not None:
        lm.quantize(mode, config=config_of(mode, training, lm.preprocessor.tokenizer))
    seconds = time.perf_counter() - begun
    loss = math.log(lm.perplexity(validation))
    sizes = [np.prod(v.shape) * np.dtype(v.value.dtype).itemsize for v in lm.backbone.weights]
    del lm
    gc.collect()
    return {
        "nats_per_character": round(loss, 5),
        "weight_bytes": int(sum(sizes)),
        "quantize_s": round(seconds, 1),
    }


def config_of(mode: str, training: str, tokenizer):
    if mode == "gptq":
        return keras.quantizers.GPTQConfig([training], tokenizer, **CALIBRATION)
    if mode == "awq":
        return keras.quantizers.AWQConfig([training], tokenizer, **CALIBRATION)
    return None


def table(variants: dict[str, dict]) -> str:
    plain = variants.get("float32")
    lines = [
        "| | nats a character | more than float32 | weights, MB |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in variants.items():
        loss = row["nats_per_character"]
        more = "" if plain is None else f"{loss - plain['nats_per_character']:+.4f}"
        lines.append(f"| {name} | {loss:.4f} | {more} | {row['weight_bytes'] / 1e6:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
