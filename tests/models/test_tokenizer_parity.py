"""Ids are those of the `tokenizers` library: eagerly, in tf.data and in grain."""

import unicodedata

import grain
import numpy as np
import pytest
import tensorflow as tf
import tokenizers

from keras_mamba2 import Mamba2Tokenizer
from tests.conftest import SHARED_DATA

PYTHON = '''
def f(x: int) -> list[int]:
    """Doc."""
    if x > 0:
            return [x**2 for _ in range(10)]   # five blanks deep\n\n\n
\treturn None
'''
TEXTS = [
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer",
    PYTHON,
    "  two\n   three\n    four\n" + " " * 24 + "twenty-four\n" + " " * 40 + "forty",
    "🤷🏽‍♀️ 👨‍👩‍👧‍👦 🇨🇭 😀",
    "日本語 ありがとう 中文字符 한국어 조선말",
    "e\u0301 a\u030a \u2126 \u1e9b\u0323 n\u0303o",
    "one\r\ntwo\r\n\r\nthree\rfour",
    "\x00\x01\x07\x1b[0m\x7f\u200b\ufeff\u2028",
    "<|endoftext|> inside <|padding|> and <|endoftext|><|endoftext|>",
    "",
    " ",
]


def random_texts(count):
    """Texts of all planes of Unicode, and of what byte-pair encoding is touchy about."""
    rng = np.random.default_rng(0)
    touchy = list(" \n\t\r'\"<|>_0129aZé中🤷\u0301\u200d")
    texts = []
    for i in range(count):
        size = int(rng.integers(0, 24))
        if i % 2:
            codes = rng.integers(0, [0x80, 0x800, 0x10000, 0x110000][i // 2 % 4], size)
            texts.append("".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000))
        else:
            texts.append("".join(rng.choice(touchy, size)))
    return texts


def llama_style():
    """A byte-fallback model with Metaspace, which adds a start token, as Codestral's."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary.update({f"<0x{byte:02X}>": 3 + byte for byte in range(256)})
    for token in ["▁", "t", "o", "b", "e", "▁t", "▁b", "to", "be", "▁to", "▁be", "▁▁"]:
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "t"), ("▁", "b"), ("t", "o"), ("b", "e"), ("▁t", "o"), ("▁b", "e"), ("▁", "▁")]
    model = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    engine = tokenizers.Tokenizer(model)
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first", split=False
    )
    engine.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    engine.add_special_tokens(["<s>", "</s>"])
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return engine


@pytest.fixture(scope="module", params=["gpt-neox", "llama-style"])
def engine_and_file(request, tmp_path_factory):
    if request.param == "llama-style":
        file = tmp_path_factory.mktemp("llama") / "tokenizer.json"
        llama_style().save(str(file))
        return llama_style(), file, {"start_token": "<s>", "end_token": "</s>"}
    file = SHARED_DATA / "gpt-neox-20b" / "tokenizer.json"
    if not file.exists():
        pytest.skip("the GPT-NeoX tokenizer of the shared data is absent")
    return tokenizers.Tokenizer.from_file(str(file)), file, {}


@pytest.fixture(scope="module")
def engine(engine_and_file):
    return engine_and_file[0]


@pytest.fixture(scope="module")
def tokenizer(engine_and_file):
    _, file, tokens = engine_and_file
    return Mamba2Tokenizer(tokenizer=file, **tokens)


@pytest.fixture(scope="module")
def texts():
    return TEXTS + random_texts(10_000)


@pytest.fixture(scope="module")
def expected(engine, texts):
    return [encoding.ids for encoding in engine.encode_batch(texts)]


def test_eagerly(tokenizer, texts, expected):
    assert tokenizer(texts) == expected
    assert [tokenizer(text).tolist() for text in TEXTS] == expected[: len(TEXTS)]


def test_in_tf_data(tokenizer, texts, expected):
    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(1000).map(tokenizer)
    assert [row for batch in dataset for row in batch.to_list()] == expected


def test_in_grain(tokenizer, texts, expected):
    dataset = grain.MapDataset.source(texts).map(tokenizer)
    assert [np.asarray(ids).tolist() for ids in dataset] == expected


def test_decoding_gives_the_text_back(tokenizer, engine, texts, expected):
    decoded = tokenizer.detokenize(expected)
    assert decoded == engine.decode_batch(expected, skip_special_tokens=False)
    if tokenizer.start_token == "<s>":
        return  # Metaspace eats a blank, the start token is written out
    assert decoded == [unicodedata.normalize("NFC", text) for text in texts]
