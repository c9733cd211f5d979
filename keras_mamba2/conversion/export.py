"""From a backbone to a folder that transformers loads."""

import json
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np

from keras_mamba2.atomic_files import atomic_folder
from keras_mamba2.conversion.architectures import exported_as
from keras_mamba2.conversion.config import transformers_config
from keras_mamba2.conversion.generation_config import GENERATION_CONFIG_FILE
from keras_mamba2.conversion.names import Names
from keras_mamba2.conversion.names import Piece
from keras_mamba2.conversion.names import Weight
from keras_mamba2.conversion.progress import progress
from keras_mamba2.conversion.readers import SAFETENSORS_DTYPES
from keras_mamba2.conversion.soundness import non_finite
from keras_mamba2.conversion.stored_tensor import numpy_dtype
from keras_mamba2.conversion.tokenizer import write_chat_template
from keras_mamba2.host.finite import is_finite

SHARD_BYTES = 5 * 10**9
DTYPES = ("float32", "float16", "bfloat16", "float64")
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# Float32 whatever the dtype of the model, also in a file.
FLOAT32 = ("A_log", "dt_bias", "D", "e_score_correction_bias", "mixer.gate.weight")


class StoredWeight(NamedTuple):
    """A tensor of a file, and the variables that it is made of."""

    name: str
    sources: Sequence[tuple[keras.Variable, Piece]]
    dtype: np.dtype

    @classmethod
    def of(cls, variable: keras.Variable, weight: Weight) -> "StoredWeight":
        """What is one variable as a whole."""
        sources = [(variable, Piece(weight, weight.name))]
        return cls(weight.name, sources, numpy_dtype(variable.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        variable, piece = self.sources[0]
        return piece.file_shape(variable.shape)

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def bytes(self) -> np.ndarray:
        tensor = np.empty(self.shape, self.dtype)
        for variable, piece in self.sources:
            value = piece.of_variable(keras.ops.convert_to_numpy(variable.value))
            with np.errstate(over="ignore"):
                piece.of_file(tensor)[...] = piece.weight.layout.to_file(value)
        if not is_finite(tensor):
            raise ValueError(
                f"Weights would not be finite numbers: {non_finite(self.name, tensor)}. Those that "
                "are too large for float16 fit into dtype='bfloat16'."
            )
        return tensor.reshape(-1).view(np.uint8)


def export_to_transformers(
    backbone,
    tokenizer,
    folder,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    generation_defaults: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer`.

    The folder appears when it is complete: an interruption leaves nothing under its name.

    Args:
        backbone: a `Mamba2Backbone`, or a `Mamba2HybridBackbone` of a kind that transformers has.
        tokenizer: a `Mamba2Tokenizer`, or `None` to write no tokenizer and no token ids.
        folder: the path of a folder that does not exist yet, or is empty.
        dtype: string, the dtype of the weights in the files, `None` for that of the variables.
            `A_log`, `dt_bias` and `D` are float32 whatever it is, unless it is float64.
        shard_bytes: int, weights above this many bytes are cut into files of at most that size
            (a larger tensor has a file of its own), with an index.
        generation_defaults: dict, what `generation_config.json` has beside the ids of tokens.

    Raises:
        ValueError: for a folder with files in it, an unknown dtype, a model with LoRA adapters or
            quantized weights, and a hybrid that transformers does not have.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be None or one of {DTYPES}. Received: dtype={dtype}")
    backbone_config = backbone.get_config()
    names = exported_as(backbone_config)[0].names_for(backbone_config)
    weights = _weights(backbone.weights, names, dtype)
    if not backbone.get_config()["tie_word_embeddings"]:
        # Then transformers 5 shares nothing at all, also not the blocks of Zamba2.
        weights += _copies(weights, names)
    ids = _special_ids(tokenizer)
    config = transformers_config(
        backbone.get_config(), dtype or backbone.token_embedding.variable_dtype, **ids
    )
    with atomic_folder(folder) as temporary:
        _write_json(temporary / "config.json", config)
        _write_weights(temporary, weights, shard_bytes)
        if tokenizer is not None:
            defaults = {**ids, **(generation_defaults or {})}
            _write_json(temporary / GENERATION_CONFIG_FILE, defaults)
            _write_tokenizer(temporary, tokenizer)


def _weights(
    variables: Sequence[keras.Variable], names: Names, dtype: str | None
) -> list[StoredWeight]:
    sources: dict[str, list[tuple[keras.Variable, Piece]]] = {}
    for variable in variables:
        for piece in names.pieces(variable):
            sources.setdefault(piece.name, []).append((variable, piece))
    for name, parts in sources.items():
        _check_whole(name, [piece.weight for _, piece in parts])
    return [
        StoredWeight(name, parts, _dtype(name, parts[0][0], dtype))
        for name, parts in sources.items()
    ]


def _copies(weights: Sequence[StoredWeight], names: Names) -> list[StoredWeight]:
    """What is shared, once more for each other place."""
    return [
        weight._replace(name=copy + weight.name.removeprefix(original))
        for copy, original in names.copies.items()
        for weight in weights
        if copy != original and weight.name.startswith(original)
    ]


def _check_whole(name: str, weights: Sequence[Weight]) -> None:
    """Raises if the variables leave rows of a tensor without values."""
    expected = list(range(len(weights[0].parts)))
    found = sorted(weight.part for weight in weights)
    if found != expected:
        raise ValueError(
            f"{name} is made of parts {expected}, of which the model has {found}: it is no model "
            "of this family. Save it with `save_to_preset`."
        )


def _dtype(name: str, variable: keras.Variable, dtype: str | None) -> np.dtype:
    if dtype is None or (dtype != "float64" and name.endswith(FLOAT32)):
        dtype = variable.dtype
    return numpy_dtype(dtype)


def _write_weights(folder: pathlib.Path, weights: Sequence[StoredWeight], shard_bytes: int) -> None:
    shards = _shards(weights, shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", weights)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(file, shard)
        weight_map.update({weight.name: file.name for weight in shard})
    metadata = {"total_size": sum(weight.size for weight in weights)}
    index = {"metadata": metadata, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _shards(weights: Sequence[StoredWeight], shard_bytes: int) -> list[list[StoredWeight]]:
    shards: list[list[StoredWeight]] = [[]]
    size = 0
    for weight in weights:
        if shards[-1] and size + weight.size > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += weight.size
    return shards


def write_safetensors(file: pathlib.Path, weights: Sequence[StoredWeight]) -> None:
    """Writes one safetensors file, one tensor in memory at a time."""
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        start, end = end, end + weight.size
        header[weight.name] = {
            "dtype": SAFETENSORS_NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [start, end],
        }
    content = json.dumps(header, separators=(",", ":")).encode("utf-8")
    content += b" " * (-len(content) % 8)  # the data start at a multiple of 8
    with file.open("xb") as stream:
        stream.write(len(content).to_bytes(8, "little"))
        stream.write(content)
        for weight in progress(weights, f"Writing {file.name}", end):
            stream.write(weight.bytes().data)


def _special_ids(tokenizer) -> dict[str, int | None]:
    if tokenizer is None:
        return {}
    return {
        "bos_token_id": tokenizer.start_token_id,
        "eos_token_id": tokenizer.end_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _write_tokenizer(folder: pathlib.Path, tokenizer) -> None:
    tokenizer.engine.save(str(folder / "tokenizer.json"))
    template = tokenizer.chat_template
    config = {
        **(template.special_tokens if template is not None else {}),
        # Takes tokenizer.json as it is; a model's own class would rebuild the pipeline.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.start_token,
        "eos_token": tokenizer.end_token,
        "pad_token": tokenizer.pad_token,
    }
    _write_json(folder / "tokenizer_config.json", config)
    if template is not None:
        write_chat_template(folder, template)


def _write_json(file: pathlib.Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
