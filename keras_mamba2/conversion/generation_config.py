"""What a checkpoint's `generation_config.json` says of stop tokens and of sampling."""

import pathlib
from collections.abc import Mapping
from typing import Any

from keras_mamba2.preset_files import CONFIG_FILE
from keras_mamba2.preset_files import read_json

GENERATION_CONFIG_FILE = "generation_config.json"
KEYS = (
    "eos_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
)


def generation_defaults(folder: pathlib.Path) -> dict[str, Any]:
    """The settings of `KEYS` that a checkpoint has.

    Without a file of them, the ends of a turn may stand in `config.json`, beside that of a text.
    """
    file = folder / GENERATION_CONFIG_FILE
    if not file.is_file():
        file = folder / CONFIG_FILE
        ends = read_json(file).get("eos_token_id") if file.is_file() else None
        return checked_defaults({"eos_token_id": ends}) if isinstance(ends, list) else {}
    try:
        return checked_defaults(read_json(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def checked_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `KEYS` in `config`, numbers all of them.

    Raises:
        ValueError: that names a value of another type.
    """
    found = {key: config[key] for key in KEYS if config.get(key) is not None}
    for key, value in found.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            whole = key not in ("temperature", "top_p", "min_p", "repetition_penalty")
            if not isinstance(number, int if whole else (int, float)):
                raise ValueError(
                    f"The setting `{key}` of generation must be a number. Received: {key}={value!r}"
                )
    return found
