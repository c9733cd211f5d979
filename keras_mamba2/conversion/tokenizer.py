"""The tokenizer files of a checkpoint -> the constructor arguments of `Mamba2Tokenizer`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers

from keras_mamba2.chat import ChatTemplate
from keras_mamba2.conversion.config import errors_naming
from keras_mamba2.preset_files import CONFIG_FILE
from keras_mamba2.preset_files import read_json
from keras_mamba2.untrusted import LARGEST_JSON
from keras_mamba2.untrusted import LARGEST_TOKENIZER
from keras_mamba2.untrusted import read_bytes
from keras_mamba2.untrusted import shortened

TOKENIZER_FILE = "tokenizer.json"
BYTE_PAIR_FILES = ("vocab.json", "merges.txt")
BYTE_PAIR_CLASSES = ("GPT2Tokenizer", "GPTNeoXTokenizer")
ADDED_TOKENS_FILE = "added_tokens.json"
# Where special tokens are named, the first that names one wins. The ids in config.json come last:
# those of some exports are placeholders.
SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_CONFIG_FILE = SPECIAL_TOKEN_FILES[0]
# What transformers hands to templates.
NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")  # how a token is matched
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"


def has_tokenizer(folder: pathlib.Path) -> bool:
    return (folder / TOKENIZER_FILE).is_file() or all(
        (folder / file).is_file() for file in BYTE_PAIR_FILES
    )


def tokenizer_arguments(folder: pathlib.Path) -> dict[str, Any]:
    """The arguments of `Mamba2Tokenizer` for the tokenizer in `folder`.

    Raises:
        ValueError: that names the file, for one of another form.
    """
    with errors_naming(folder / TOKENIZER_CONFIG_FILE):
        return _tokenizer_arguments(folder)


def _tokenizer_arguments(folder: pathlib.Path) -> dict[str, Any]:
    if (folder / TOKENIZER_FILE).is_file():
        arguments: dict[str, Any] = {"tokenizer": _with_added_tokens(folder)}
    else:
        _check_byte_pairs(folder)
        vocabulary, merges = (str(folder / file) for file in BYTE_PAIR_FILES)
        arguments = {"vocabulary": vocabulary, "merges": merges}
    template = chat_template(folder)
    if template is not None:
        arguments["chat_template"] = template
    return {**arguments, **special_tokens(folder)}


def _check_byte_pairs(folder: pathlib.Path) -> None:
    """Raises for a tokenizer that its vocabulary and merges do not tell all about."""
    config = _config(folder)
    kind = str(config.get("tokenizer_class") or BYTE_PAIR_CLASSES[0])
    added = [_content(token) for token in (config.get("added_tokens_decoder") or {}).values()]
    if (folder / ADDED_TOKENS_FILE).is_file():
        added += read_json(folder / ADDED_TOKENS_FILE)
    vocabulary = read_json(folder / BYTE_PAIR_FILES[0], LARGEST_TOKENIZER)
    unknown = [token for token in added if token not in vocabulary]
    if kind.removesuffix("Fast") not in BYTE_PAIR_CLASSES or unknown:
        found = f"added tokens such as {unknown[0]!r}" if unknown else f"tokenizer_class={kind!r}"
        raise ValueError(
            f"{folder} has a tokenizer of {' and '.join(BYTE_PAIR_FILES)}, with {found}. Make its "
            f"{TOKENIZER_FILE} with transformers: AutoTokenizer.from_pretrained(folder)"
            ".save_pretrained(folder)."
        )


def special_tokens(folder: pathlib.Path) -> dict[str, str | None]:
    """`start_token`, `end_token` and `pad_token`, `None` where the checkpoint has none."""
    keys = {"start_token": "bos_token", "end_token": "eos_token", "pad_token": "pad_token"}
    named = _named_tokens(folder)
    if not set(keys.values()) <= set(named):
        named = {**_tokens_by_id(folder), **named}
    return {argument: _content(named.get(key)) for argument, key in keys.items()}


def chat_template(folder: pathlib.Path) -> ChatTemplate | None:
    """The chat template of a checkpoint, `None` for a model that has none.

    As in transformers, files with templates come before `tokenizer_config.json`, which has one, or
    a list of several with their names.

    Raises:
        ValueError: that names the file, for templates of another form.
    """
    files = [folder / CHAT_TEMPLATE_FILE, *(folder / CHAT_TEMPLATE_FOLDER).glob("*.jinja")]
    found: Any = {
        "default" if file.name == CHAT_TEMPLATE_FILE else file.stem: _text_of(file)
        for file in files
        if file.is_file()
    }
    if not found:
        found = _config(folder).get("chat_template")
    if not found:
        return None
    try:
        if isinstance(found, list):
            found = {template["name"]: template["template"] for template in found}
        named = _named_tokens(folder)
        tokens = {f"{key}_token": _content(named.get(f"{key}_token")) for key in NAMED_TOKENS}
        return ChatTemplate(found, {key: token for key, token in tokens.items() if token})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / TOKENIZER_CONFIG_FILE}: `chat_template` must be a string, or a list of "
            f"dicts with `name` and `template`. Received: {str(found)[:100]}"
        ) from error


def _text_of(file: pathlib.Path) -> str:
    with errors_naming(file):
        return read_bytes(file, LARGEST_JSON).decode()


def write_chat_template(folder: pathlib.Path, template: ChatTemplate) -> None:
    """Writes the files that `chat_template`, and transformers, read."""
    for name, source in template.templates.items():
        file = folder / CHAT_TEMPLATE_FOLDER / f"{name}.jinja"
        if name == "default":
            file = folder / CHAT_TEMPLATE_FILE
        file.parent.mkdir(exist_ok=True)
        file.write_text(source, "utf-8")


def _config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / TOKENIZER_CONFIG_FILE
    return read_json(file) if file.is_file() else {}


def _named_tokens(folder: pathlib.Path) -> dict[str, Any]:
    """What the files name, the special tokens among it."""
    named: dict[str, Any] = {}
    for file in SPECIAL_TOKEN_FILES:
        if (folder / file).is_file():
            named = {**read_json(folder / file), **named}
    return named


def _content(token: Mapping[str, Any] | str | None) -> str | None:
    """A token's text. It is written out as that, or with how it is matched."""
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str) and token is not None:
        raise ValueError(
            f"A token must be a string, or a dict with its `content`. Received: {shortened(token)}"
        )
    return content


def _with_added_tokens(folder: pathlib.Path) -> tokenizers.Tokenizer | str:
    """`tokenizer.json`, with the tokens that only other files have, as transformers adds them."""
    file, missing = folder / TOKENIZER_FILE, _missing_tokens(folder)
    if not missing:
        return str(file)
    with errors_naming(file):
        engine = tokenizers.Tokenizer.from_file(str(file))
    engine.add_tokens(missing)
    return engine


def _missing_tokens(folder: pathlib.Path) -> list[tokenizers.AddedToken]:
    """The tokens that only other files have, in the order in which transformers adds them."""
    decoder = _config(folder).get("added_tokens_decoder") or {}
    added = {_content(decoder[id]): decoder[id] for id in sorted(decoder, key=int)}
    for token in _special_tokens(folder):
        content = _content(token)
        flags = token if isinstance(token, Mapping) else {}
        added[content] = {**flags, **added.get(content, {}), "special": True}
    known = {token["content"] for token in _added_tokens(folder)} if added else set()
    return [
        tokenizers.AddedToken(content, **{flag: token[flag] for flag in FLAGS if flag in token})
        for content, token in added.items()
        if content not in known
    ]


def _special_tokens(folder: pathlib.Path) -> list[Mapping[str, Any] | str]:
    """All that the files name: those that every tokenizer may have, the model's own, and more."""
    named = _named_tokens(folder)
    keys = [f"{key}_token" for key in NAMED_TOKENS]
    keys += [key for key in named if key.endswith("_token") and key not in keys]
    more = named.get("extra_special_tokens") or named.get("additional_special_tokens")
    more = more if isinstance(more, list | Mapping) else []
    values = [named.get(key) for key in keys]
    values += more.values() if isinstance(more, Mapping) else more
    return [value for value in values if isinstance(value, str | Mapping)]


def _added_tokens(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Those of `tokenizer.json`: dicts with `id` and `content`."""
    file = folder / TOKENIZER_FILE
    tokens = read_json(file, LARGEST_TOKENIZER).get("added_tokens") or []
    with errors_naming(file):
        return [{"id": int(token["id"]), "content": _content(token)} for token in tokens]


def _tokens_by_id(folder: pathlib.Path) -> dict[str, str]:
    """The tokens that `config.json` names by id, by their names."""
    if not (folder / CONFIG_FILE).is_file() or not (folder / TOKENIZER_FILE).is_file():
        return {}
    texts = {token["id"]: token["content"] for token in _added_tokens(folder)}
    config = read_json(folder / CONFIG_FILE)
    ids = {key: config.get(f"{key}_token_id") for key in ("bos", "eos", "pad")}
    # Of several, the first is the end of a text, and the others end a turn.
    ids = {key: id[0] if isinstance(id, list) and id else id for key, id in ids.items()}
    return {f"{key}_token": texts[id] for key, id in ids.items() if type(id) is int and id in texts}
