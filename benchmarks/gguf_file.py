"""A checkpoint of transformers as a file for llama.cpp."""

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
from gguf.quants import quantize
from safetensors import safe_open

from benchmarks import gguf_tensors

# What stays float32 beside vectors, whatever the type of the file, as in llama.cpp's converter.
FLOAT32 = ("ssm_conv1d.weight", "ssm_a", "ssm_d", "ssm_norm.weight", "ffn_gate_inp.weight")


def write_gguf(folder: Path, path: Path, type_name: str = "F32") -> None:
    """Writes the weights of a folder with `config.json` and float32 safetensors.

    The vocabulary is a word for each id, without a tokenizer: prompts are ids.

    Args:
        folder: in the format of transformers.
        path: of the new file.
        type_name: of `gguf.GGMLQuantizationType`, for matrices: F32, BF16, Q8_0.
    """
    config = json.loads((folder / "config.json").read_text())
    family = gguf_tensors.family_of(config)
    kind = gguf.GGMLQuantizationType[type_name]
    writer = gguf.GGUFWriter(path, family.architecture)
    for name, value in family.sizes(config).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"w{i}" for i in range(config["vocab_size"])])
    writer.add_token_merges(["w 0"])  # there must be one
    for name, array in gguf_tensors.tensors(config, read(folder)):
        small = array.ndim < 2 or name.endswith(FLOAT32)
        stored = gguf.GGMLQuantizationType.F32 if small else kind
        writer.add_tensor(name, quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(folder: Path) -> Iterator[gguf_tensors.Weight]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            for name in sorted(tensors.keys()):
                yield name, tensors.get_tensor(name)
