"""The configuration of a checkpoint <-> the constructor arguments of a backbone."""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from keras_mamba2.conversion.architectures import architecture_of
from keras_mamba2.conversion.architectures import exported_as
from keras_mamba2.conversion.config_values import check_arguments
from keras_mamba2.conversion.config_values import check_values
from keras_mamba2.preset_files import CONFIG_FILE
from keras_mamba2.preset_files import read_json
from keras_mamba2.untrusted import shortened

LONGEST_ERROR = 1000
QUANTIZATION_KEYS = ("quantization_config", "quantization")  # of transformers, of MLX


def format_of(config: Mapping[str, Any]) -> str:
    """Tells whose `config.json` this is: the name of its `Architecture`.

    Raises:
        ValueError: for Mamba-1, another model type, and a configuration of neither
            transformers nor state-spaces.
    """
    return architecture_of(config).name


def constructor_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Mamba2Backbone`, or `Mamba2HybridBackbone`, for a `config.json`.

    `vocabulary_size` counts the padding rows of the embedding, as the tensors do. `chunk_size`
    is not taken over: it does not belong to a model but to the machine that it runs on.

    Raises:
        ValueError: as `format_of`, and for an option that changes the architecture.
    """
    return architecture_of(config).arguments(config)


def read_constructor_arguments(folder) -> dict[str, Any]:
    """`constructor_arguments` of the `config.json` in `folder`.

    Raises:
        ValueError: that names the file, as `constructor_arguments`, and for values that no model
            has: see `config_values`.
    """
    file = pathlib.Path(folder) / CONFIG_FILE
    config = read_json(file)
    with errors_naming(file):
        check_values(config)
        try:
            arguments = constructor_arguments(config)
        except KeyError as error:
            raise ValueError(f"the configuration has no `{error.args[0]}`.") from error
        check_arguments(arguments)
    return arguments


def check_unquantized(config: Mapping[str, Any]) -> None:
    """Raises for quantized weights, of which there are many forms, before they are fetched."""
    for key in QUANTIZATION_KEYS:
        if found := config.get(key):
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            raise ValueError(
                f"the weights are quantized{f' with {method}' if method else ''} (`{key}`), in a "
                "form that is not read. Take the repository that they were made from, and call "
                "`quantize` once it is loaded."
            )


@contextlib.contextmanager
def errors_naming(file) -> Iterator[None]:
    """Whatever a value in `file` leads to becomes a `ValueError` that names the file, once."""
    try:
        yield
    # A value of a wrong type can fail anywhere, in anybody's code.
    except Exception as error:
        if isinstance(error, ValueError) and str(pathlib.Path(file).parent) in str(error):
            raise
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: {shortened(text, LONGEST_ERROR)}") from error


def transformers_config(
    backbone_config: Mapping[str, Any],
    dtype: str = "float32",
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The `config.json` with which transformers builds a model: `constructor_arguments` reversed.

    Args:
        backbone_config: `get_config()` of the backbone.
        dtype: string, the dtype that transformers loads the weights in.
        bos_token_id: int, or `None` if there is none.
        eos_token_id: int, or `None` if there is none.
        pad_token_id: int, or `None` if there is none.

    Raises:
        ValueError: for a hybrid of a kind that transformers does not have.
    """
    _, config = exported_as(backbone_config)
    expansion = config.get("expand", config.get("mamba_expand", 1))
    if expansion != int(expansion):
        warnings.warn(
            f"expansion={expansion} is not a whole number: transformers from version 5 on refuses "
            "the exported model, older versions load it.",
            stacklevel=4,
        )
    return {
        **config,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,  # the same to transformers before 4.56
    }
