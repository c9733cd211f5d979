"""What a preset or checkpoint is, without its weights."""

import collections
import math
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_mamba2.conversion.architectures import architecture_of
from keras_mamba2.conversion.architectures.architecture import backbone_name
from keras_mamba2.conversion.config import errors_naming
from keras_mamba2.conversion.config import read_constructor_arguments
from keras_mamba2.conversion.deferred import deferred_initialization
from keras_mamba2.conversion.preset_loader import CheckpointLoader
from keras_mamba2.conversion.preset_loader import is_quantized
from keras_mamba2.conversion.tokenizer import TOKENIZER_FILE
from keras_mamba2.preset_files import CONFIG_FILE
from keras_mamba2.preset_files import KERAS_TOKENIZER
from keras_mamba2.preset_files import Preset

SHOWN = (
    "num_layers",
    "hidden_dim",
    "state_dim",
    "head_dim",
    "num_groups",
    "expansion",
    "conv_kernel_size",
    "tie_word_embeddings",
)


def describe(preset) -> dict[str, str]:
    """Lines to print about `preset`: a name, a local folder, or `hf://user/name`."""
    files = Preset(preset)
    if files.is_checkpoint:
        arguments = read_constructor_arguments(files.folder)
        architecture = architecture_of(files.config)
        name = backbone_name(arguments)
        tokenizer, kind = _tokenizer_of_checkpoint(files), architecture.name
    else:
        folder = files.keras_folder(weights=False, tokenizer=False)
        name, arguments = files.config["registered_name"], files.config["config"]
        tokenizer, kind = f"{folder}/{KERAS_TOKENIZER[-1]}", "KerasHub"
    with errors_naming(files.folder / CONFIG_FILE):
        backbone = _without_values(name, arguments)
    return {
        "format": kind,
        "parameters": _parameters(backbone, arguments),
        "weights": _weights(backbone, name, arguments),
        "state": _state(backbone),
        "vocabulary": f"{backbone.unpadded_vocabulary_size:,} tokens, "
        f"{backbone.vocabulary_size:,} rows",
        **_layers(arguments),
        "tokenizer": tokenizer,
    }


def _without_values(name: str, arguments: Mapping[str, Any], dtype: Any = "float32"):
    with deferred_initialization():
        return keras.saving.get_registered_object(name)(**{**arguments, "dtype": dtype})


def _weights(backbone, name: str, arguments: Mapping[str, Any]) -> str:
    """The bytes that they take, as they are loaded."""
    saved = arguments.get("dtype")
    if is_quantized(saved):
        stored = _without_values(name, arguments, saved)
        nbytes = sum(np.dtype(w.dtype).itemsize * math.prod(w.shape) for w in stored.weights)
        return f"{megabytes(nbytes)}, quantized"
    parameters = backbone.count_params()
    return f"{megabytes(4 * parameters)} in float32, {megabytes(2 * parameters)} in bfloat16"


def _parameters(backbone, arguments: Mapping[str, Any]) -> str:
    """How many, and where a token takes a few of the experts, how many it uses."""
    total = used = backbone.count_params()
    for weight in backbone.weights:
        path = weight.path.split("/")
        if len(path) > 2 and path[-2] in ("experts_gate", "experts_up", "experts_down"):
            sizes = arguments["sublayers"].get(path[-3], {})
            if "num_experts" not in sizes:  # of a sublayer that has the name of a part
                continue
            left_out = sizes["num_experts"] - sizes["num_experts_per_token"]
            used -= left_out * math.prod(weight.shape[1:])
    return f"{total:,}" if used == total else f"{total:,}, of which a token uses {used:,}"


def _state(backbone) -> str:
    """What a sequence costs."""
    fixed, per_token = state_bytes(backbone)
    text = f"{megabytes(fixed)} a sequence in float32"
    if not per_token:
        return f"{text}, whatever its length"
    return f"{text}, and {per_token:,} bytes a token for attention"


def state_bytes(backbone) -> tuple[int, int]:
    """The bytes of the state of one sequence: in any case, and for each token that it has."""
    fixed = per_token = 0
    for spec in tree.flatten(backbone.state_spec()):
        nbytes = np.dtype(spec.dtype).itemsize
        size = nbytes * math.prod(size for size in spec.shape if size is not None)
        if spec.room_axis is None:
            fixed += size
        else:
            per_token += size
    return fixed, per_token


def _layers(arguments: Mapping[str, Any]) -> dict[str, str]:
    """The sizes, and for a hybrid what there is of each kind."""
    shown = {name: str(arguments[name]) for name in SHOWN if name in arguments}
    if "blocks" not in arguments:
        return shown
    counts = collections.Counter(
        name for names in arguments["blocks"] for name in re.split("[+>]", names)
    )
    for name, sizes in arguments["sublayers"].items():
        sizes = ", ".join(f"{key}={value}" for key, value in sizes.items() if key != "kind")
        shown[name] = f"{counts[name]} times: {sizes}"
    return shown


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _tokenizer_of_checkpoint(files: Preset) -> str:
    if "tokenizer" in files.sources:
        return files.sources["tokenizer"]
    try:
        folder = CheckpointLoader(files).locate_tokenizer()
        return str(folder / TOKENIZER_FILE if (folder / TOKENIZER_FILE).is_file() else folder)
    except ValueError as error:
        return f"none: {error}"
