"""The tokenizer files of a checkpoint -> the constructor arguments of `Mamba2Tokenizer`."""

import pathlib
from collections.abc import Mapping
from typing import Any

from keras_mamba2.preset_files import CONFIG_FILE
from keras_mamba2.preset_files import read_json

TOKENIZER_FILE = "tokenizer.json"
BYTE_PAIR_FILES = ("vocab.json", "merges.txt")
# Where special tokens are named, the first that names one wins. The ids in config.json come last:
# those of some exports are placeholders.
SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def has_tokenizer(folder: pathlib.Path) -> bool:
    return (folder / TOKENIZER_FILE).is_file() or all(
        (folder / file).is_file() for file in BYTE_PAIR_FILES
    )


def tokenizer_arguments(folder: pathlib.Path) -> dict[str, Any]:
    """The arguments of `Mamba2Tokenizer` for the tokenizer in `folder`."""
    if (folder / TOKENIZER_FILE).is_file():
        arguments: dict[str, Any] = {"tokenizer": str(folder / TOKENIZER_FILE)}
    else:
        vocabulary, merges = (str(folder / file) for file in BYTE_PAIR_FILES)
        arguments = {"vocabulary": vocabulary, "merges": merges}
    return {**arguments, **special_tokens(folder)}


def special_tokens(folder: pathlib.Path) -> dict[str, str | None]:
    """`start_token`, `end_token` and `pad_token`, `None` where the checkpoint has none."""
    named: dict[str, Any] = {}
    for file in SPECIAL_TOKEN_FILES:
        if (folder / file).is_file():
            named = {**read_json(folder / file), **named}
    by_id = _tokens_by_id(folder)
    tokens = {}
    for argument, key in (("start_token", "bos"), ("end_token", "eos"), ("pad_token", "pad")):
        token = named[f"{key}_token"] if f"{key}_token" in named else by_id.get(f"{key}_token_id")
        # Written out as text, or with how it is matched.
        tokens[argument] = token["content"] if isinstance(token, Mapping) else token
    return tokens


def _tokens_by_id(folder: pathlib.Path) -> dict[str, str]:
    """The tokens that `config.json` names by id, found among the added tokens."""
    if not (folder / CONFIG_FILE).is_file() or not (folder / TOKENIZER_FILE).is_file():
        return {}
    added = read_json(folder / TOKENIZER_FILE).get("added_tokens") or []
    texts = {token["id"]: token["content"] for token in added}
    config = read_json(folder / CONFIG_FILE)
    keys = [f"{key}_token_id" for key in ("bos", "eos", "pad")]
    return {key: texts[config[key]] for key in keys if config.get(key) in texts}
