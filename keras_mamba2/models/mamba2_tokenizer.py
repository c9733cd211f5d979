import json
import os
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence

import keras
import keras_hub
import numpy as np
import tokenizers

from keras_mamba2._compat.keras_hub_preprocessing import add_special_token
from keras_mamba2._compat.keras_hub_preprocessing import canonicalize_python_string_inputs
from keras_mamba2._compat.keras_hub_preprocessing import canonicalize_python_token_inputs
from keras_mamba2._compat.keras_hub_preprocessing import preprocessing_function
from keras_mamba2._compat.keras_hub_preprocessing import restore_outer_shape
from keras_mamba2._compat.keras_hub_preprocessing import update_special_token_ids
from keras_mamba2._compat.keras_hub_preprocessing import uses_tensorflow
from keras_mamba2._compat.keras_hub_presets import load_tokenizer
from keras_mamba2.arguments import STRING
from keras_mamba2.arguments import Kind
from keras_mamba2.arguments import check_keywords
from keras_mamba2.arguments import check_names
from keras_mamba2.arguments import instance
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import optional
from keras_mamba2.arguments import several
from keras_mamba2.arguments import shown
from keras_mamba2.chat import ChatTemplate
from keras_mamba2.conversion import open_preset
from keras_mamba2.preset_files import BACKBONE_NAMES
from keras_mamba2.saving import TOKENIZER_FILES
from keras_mamba2.saving import AtomicPreset

TOKENIZER_FILE = "tokenizer.json"


def _integer_dtype(dtype):
    if not keras.backend.is_int_dtype(dtype):
        raise TypeError
    return dtype


INTEGER_DTYPE = Kind("an integer dtype", _integer_dtype)
ENGINE = optional(
    instance(
        (tokenizers.Tokenizer, str, os.PathLike),
        "a `tokenizers.Tokenizer` or the path of a `tokenizer.json`",
    )
)


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2Tokenizer(AtomicPreset, keras_hub.tokenizers.Tokenizer):
    """Byte-pair tokenizer of Mamba-2 models, run by the Rust `tokenizers` library.

    Text becomes the same ids eagerly, inside `tf.data` and inside grain, because the same engine
    runs in all three. A saved tokenizer is one file in the format of that library.

    Args:
        vocabulary: dict from token to id, or the path of a JSON file with one. With `merges`,
            the pipeline is that of GPT-NeoX: NFC, byte-level byte-pair encoding, no prefix space.
        merges: list of merge rules `"a b"`, or the path of a file with one a line.
        tokenizer: instead of the two, a `tokenizers.Tokenizer` or the path of a `tokenizer.json`.
        start_token: string, or `None` if there is none.
        end_token: string, or `None` if there is none.
        pad_token: string; `None` for the end token. Padding is known by its mask and never by
            its id, so any token serves.
        chat_template: a `keras_mamba2.ChatTemplate`, or the source of one: how conversations are
            written for the model. `None` for a model that does not know any.
        **kwargs: see `keras.layers.Layer`. `dtype` is that of the ids.

    Call arguments:
        inputs: a string, or a list, array or tensor of strings.

    Returns:
        For one string an int array `(t)`, for a batch a list of lists (in `tf.data` a ragged
        tensor).

    Example:
    ```python
    tokenizer = keras_mamba2.Mamba2Tokenizer(tokenizer="tokenizer.json")
    tokenizer.detokenize(tokenizer(["To be, or not to be"]))  # ["To be, or not to be"]
    ```
    """

    preset_files = TOKENIZER_FILES

    def __init__(
        self,
        vocabulary: Mapping[str, int] | str | None = None,
        merges: Sequence[str] | str | None = None,
        tokenizer: tokenizers.Tokenizer | str | None = None,
        start_token: str | None = "<|endoftext|>",
        end_token: str | None = "<|endoftext|>",
        pad_token: str | None = None,
        chat_template: ChatTemplate | Mapping[str, str] | str | None = None,
        dtype="int32",
        **kwargs,
    ):
        check_keywords(type(self), kwargs, "config_file")
        INTEGER_DTYPE("dtype", dtype)
        super().__init__(dtype=dtype, **kwargs)
        self.file_assets = [TOKENIZER_FILE]
        pad_token = end_token if pad_token is None else pad_token
        specials = {"start_token": start_token, "end_token": end_token, "pad_token": pad_token}
        for name, token in specials.items():
            if optional(STRING)(name, token) is None:
                setattr(self, name, None)
                setattr(self, f"{name}_id", None)
            else:
                add_special_token(self, token, name)
        if chat_template is not None and not isinstance(chat_template, ChatTemplate):
            names = {"bos_token": start_token, "eos_token": end_token, "pad_token": pad_token}
            named = {name: token for name, token in names.items() if token is not None}
            chat_template = ChatTemplate(chat_template, named)
        self.chat_template = chat_template
        if (vocabulary is None) != (merges is None):
            raise ValueError(
                "`vocabulary` and `merges` must be passed together. Received: "
                f"{'merges' if vocabulary is None else 'vocabulary'} alone"
            )
        if vocabulary is not None and tokenizer is not None:
            raise ValueError("Pass either `vocabulary` and `merges`, or `tokenizer`, not both.")
        ENGINE("tokenizer", tokenizer)
        if vocabulary is not None:
            self.set_vocabulary_and_merges(vocabulary, merges)
        else:
            self._set_engine(_load(tokenizer) if _is_path(tokenizer) else tokenizer)

    @classmethod
    def from_preset(cls, preset: str, **kwargs) -> "Mamba2Tokenizer":
        """Loads a tokenizer by name or folder. See `keras_hub.tokenizers.Tokenizer`."""
        check_names(cls, kwargs, "config_file")
        INTEGER_DTYPE("dtype", kwargs.get("dtype", "int32"))
        loader, preset = open_preset(preset, weights=False)
        if loader is not None:
            return loader.load_tokenizer(cls, **kwargs)
        backbones = tuple(map(keras.saving.get_registered_object, BACKBONE_NAMES))
        return load_tokenizer(cls, backbones, preset, **kwargs)

    def set_vocabulary_and_merges(
        self, vocabulary: Mapping[str, int] | str, merges: Sequence[str] | str
    ) -> None:
        """Sets vocabulary and merge rules, given as data or as the paths of two files."""
        if _is_path(vocabulary):
            vocabulary = json.loads(_read("vocabulary", vocabulary))
        if _is_path(merges):
            merges = _read("merges", merges).splitlines()
        instance(Mapping, "a dict from token to id, or a path")("vocabulary", vocabulary)
        several(STRING)("merges", merges)
        self._set_engine(gpt_neox_engine(vocabulary, merges, self.special_tokens))

    def _set_engine(self, engine: tokenizers.Tokenizer | None) -> None:
        self._engine, self._num_ids = engine, 0
        if engine is not None:
            engine.no_padding()
            engine.no_truncation()
            # Ids may have gaps, so that the number of tokens does not bound them.
            self._num_ids = 1 + max(self.get_vocabulary().values(), default=-1)
            update_special_token_ids(self)

    @property
    def engine(self) -> tokenizers.Tokenizer:
        """The `tokenizers.Tokenizer` that does the work."""
        if self._engine is None:
            raise ValueError(
                "No vocabulary has been set for this Mamba2Tokenizer. Pass `vocabulary` and "
                "`merges`, or `tokenizer`, when creating it."
            )
        return self._engine

    @property
    def control_token_ids(self) -> list[int]:
        """The ids of the tokens that are marked as no text, such as those between messages."""
        added = self.engine.get_added_tokens_decoder()
        return [id for id, token in added.items() if token.special]

    @property
    def has_vocabulary(self) -> bool:
        return self._engine is not None

    @property
    def num_ids(self) -> int:
        """One more than the largest token id."""
        self.engine  # noqa: B018  raises where there is no vocabulary
        return self._num_ids

    def save_assets(self, dir_path: str) -> None:
        self.engine.save(os.path.join(dir_path, TOKENIZER_FILE))

    def load_assets(self, dir_path: str) -> None:
        self._set_engine(_load(os.path.join(dir_path, TOKENIZER_FILE)))

    def get_vocabulary(self) -> dict[str, int]:
        return self.engine.get_vocab(with_added_tokens=True)

    def vocabulary_size(self) -> int:
        return self.engine.get_vocab_size(with_added_tokens=True)

    def id_to_token(self, id: int) -> str:
        id = integer()("id", id)
        token = self.engine.id_to_token(id) if 0 <= id < self.num_ids else None
        if token is None:
            raise ValueError(
                f"`id` is out of the vocabulary of {self.vocabulary_size()} tokens. "
                f"Received: id={id}"
            )
        return token

    def token_to_id(self, token: str) -> int:
        id = self.engine.token_to_id(STRING("token", token))
        if id is None:
            raise ValueError(f"`token` is not in the vocabulary. Received: token={token!r}")
        return id

    def call(self, inputs, *args, training=None, **kwargs):
        return self.tokenize(inputs)

    def tokenize(self, inputs):
        self.engine  # noqa: B018  raises before a graph is traced
        if uses_tensorflow(self):
            return self._tokenize_tf(inputs)
        try:
            texts, batched, outer_shape = canonicalize_python_string_inputs(inputs)
        except ValueError:  # of UTF-8 too
            raise ValueError(
                "A text must be a string, and bytes must be UTF-8. "
                f"Received: inputs={shown(inputs)}"
            ) from None
        rows = self._encode(texts)
        if not batched:
            return np.array(rows[0], self.compute_dtype)
        return rows if outer_shape is None else restore_outer_shape(rows, outer_shape)

    def detokenize(self, inputs):
        self.engine  # noqa: B018
        if uses_tensorflow(self):
            return self._detokenize_tf(inputs)
        try:
            if _has_fractions(inputs):
                raise TypeError
            rows, batched = canonicalize_python_token_inputs(inputs)
        except (TypeError, ValueError):
            raise ValueError(
                f"Token ids must be integers, in rows or alone. Received: {shown(inputs)}"
            ) from None
        texts = self._decode(rows)
        return texts if batched else texts[0]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self.engine.encode_batch_fast(list(texts))]
        except TypeError:  # half of a surrogate pair, which is no character
            raise ValueError(
                f"A text must be of characters that UTF-8 has. Received: inputs={shown(texts)}"
            ) from None

    def _decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        try:
            texts = self.engine.decode_batch([list(row) for row in rows], skip_special_tokens=False)
        except (OverflowError, TypeError):
            raise ValueError(f"Token ids must be integers >= 0. Received: {shown(rows)}") from None
        unknown = next((id for row in rows for id in row if id >= self.num_ids), None)
        if unknown is not None:
            raise ValueError(
                f"Token ids must be below {self.num_ids}, the number of tokens. Received: {unknown}"
            )
        return texts

    @preprocessing_function
    def _tokenize_tf(self, inputs):
        import tensorflow as tf

        def encode(texts):
            rows = self._encode([text.decode("utf-8") for text in texts])
            ids = np.array([id for row in rows for id in row], self.compute_dtype)
            return ids, np.array([len(row) for row in rows], "int64")

        texts = tf.reshape(inputs, [-1])
        ids, lengths = tf.numpy_function(
            encode, [texts], (tf.as_dtype(self.compute_dtype), tf.int64)
        )
        ids.set_shape([None])
        lengths.set_shape([None])
        if inputs.shape.rank == 0:
            return ids
        return tf.RaggedTensor.from_row_lengths(ids, lengths)

    @preprocessing_function
    def _detokenize_tf(self, inputs):
        import tensorflow as tf

        def decode(ids, lengths):
            rows = np.split(ids, np.cumsum(lengths)[:-1])
            return np.array([text.encode("utf-8") for text in self._decode(rows)], dtype=object)

        if not isinstance(inputs, tf.RaggedTensor):
            unbatched = inputs.shape.rank == 1
            inputs = tf.RaggedTensor.from_tensor(inputs[tf.newaxis] if unbatched else inputs)
        else:
            unbatched = False
        texts = tf.numpy_function(decode, [inputs.flat_values, inputs.row_lengths()], tf.string)
        texts.set_shape([None])
        return texts[0] if unbatched else texts

    def compute_output_spec(self, inputs):
        return keras.KerasTensor((*inputs.shape, None), dtype=self.compute_dtype)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "start_token": self.start_token,
                "end_token": self.end_token,
                "pad_token": self.pad_token,
            }
        )
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template.get_config()
        return config

    @classmethod
    def from_config(cls, config: dict) -> "Mamba2Tokenizer":
        template = config.get("chat_template")
        if isinstance(template, Mapping):
            config = {**config, "chat_template": ChatTemplate(**template)}
        return super().from_config(config)


def gpt_neox_engine(
    vocabulary: Mapping[str, int], merges: Sequence[str], special_tokens: Sequence[str] = ()
) -> tokenizers.Tokenizer:
    """The pipeline of GPT-NeoX over a byte-level vocabulary and its merge rules.

    A vocabulary may hold tokens that byte-pair encoding cannot make: special ones like
    `<|padding|>`, and ones written with real blanks, which stand for runs of blanks in the text.
    Both are matched in the text as they are.
    """
    vocabulary = dict(vocabulary)
    rules = [tuple(rule.split(" ")) for rule in merges if rule and not rule.startswith("#version")]
    for rule in rules:
        if len(rule) != 2 or any(part not in vocabulary for part in (*rule, "".join(rule))):
            raise ValueError(
                "A merge rule must be two tokens of the vocabulary that make a third. "
                f"Received: {' '.join(rule)!r}"
            )
    try:
        engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, rules))
    except TypeError:
        raise ValueError(
            "`vocabulary` must be from strings to ids, integers >= 0. "
            f"Received: vocabulary={shown(vocabulary)}"
        ) from None
    engine.normalizer = tokenizers.normalizers.NFC()
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    in_order = sorted(vocabulary, key=vocabulary.__getitem__)
    marked = [t for t in in_order if t.startswith("<|") and t.endswith("|>")]
    engine.add_special_tokens([*marked, *(t for t in special_tokens if t in vocabulary)])
    engine.add_tokens([t for t in in_order if " " in t])
    return engine


def byte_vocabulary(*special_tokens: str) -> dict[str, int]:
    """A vocabulary of the 256 bytes, each with its value as id, then special tokens."""
    # Byte-level tokenizers write a byte as the character of its code where that one is visible,
    # and as one above 255 where it is not.
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    visible += range(ord("®"), ord("ÿ") + 1)
    hidden = iter(range(256, 512))
    characters = [chr(byte if byte in visible else next(hidden)) for byte in range(256)]
    return {token: id for id, token in enumerate([*characters, *special_tokens])}


def _is_path(value) -> bool:
    return isinstance(value, (str, os.PathLike))


def _read(name: str, path) -> str:
    if not os.path.isfile(path):
        raise ValueError(f"`{name}` must be data, or the path of a file. Received: {path}")
    return pathlib.Path(path).read_text("utf-8")


def _load(path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        reason = "there is no such file" if not os.path.exists(path) else error
        raise ValueError(f"{path} could not be read as a tokenizer: {reason}") from error


def _has_fractions(inputs) -> bool:
    """Whether token ids, as an array or in lists, are floats: Keras would cut them off."""
    if hasattr(inputs, "dtype"):
        return not keras.backend.is_int_dtype(inputs.dtype)
    if isinstance(inputs, list | tuple):
        return any(map(_has_fractions, inputs))
    return isinstance(inputs, float)
