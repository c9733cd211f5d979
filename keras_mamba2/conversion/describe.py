"""What a preset or checkpoint is, without its weights."""

from keras_mamba2.conversion.config import constructor_arguments
from keras_mamba2.conversion.config import format_of
from keras_mamba2.conversion.preset_loader import CheckpointLoader
from keras_mamba2.conversion.sizes import parameter_count
from keras_mamba2.conversion.sizes import state_bytes
from keras_mamba2.conversion.tokenizer import TOKENIZER_FILE
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
        arguments = constructor_arguments(files.config)
        tokenizer, kind = _tokenizer_of_checkpoint(files), format_of(files.config)
    else:
        folder = files.keras_folder(weights=False, tokenizer=False)
        arguments, kind = files.config["config"], "KerasHub"
        tokenizer = f"{folder}/{KERAS_TOKENIZER[-1]}"
    parameters, state = parameter_count(arguments), state_bytes(arguments)
    weights = f"{megabytes(4 * parameters)} in float32, {megabytes(2 * parameters)} in bfloat16"
    tokens = arguments.get("unpadded_vocabulary_size") or arguments["vocabulary_size"]
    return {
        "format": kind,
        "parameters": f"{parameters:,}",
        "weights": weights,
        "state": f"{megabytes(state)} a sequence in float32, whatever its length",
        "vocabulary": f"{tokens:,} tokens, {arguments['vocabulary_size']:,} rows",
        **{name: str(arguments[name]) for name in SHOWN if name in arguments},
        "tokenizer": tokenizer,
    }


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _tokenizer_of_checkpoint(files: Preset) -> str:
    if "tokenizer" in files.sources:
        return files.sources["tokenizer"]
    try:
        return str(CheckpointLoader(files).locate_tokenizer() / TOKENIZER_FILE)
    except ValueError as error:
        return f"none: {error}"
