"""The pieces of a stream are the decoded whole, for every kind of tokenizer."""

import functools

import pytest
import tokenizers
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import decoders
from tokenizers import pre_tokenizers

from keras_mamba2 import Mamba2Tokenizer
from keras_mamba2.host import text_stream
from keras_mamba2.host.text_stream import TextStream
from keras_mamba2.models.mamba2_tokenizer import byte_vocabulary

END = "<|endoftext|>"
SAMPLE = "to be, or not to be: that is the question. Être ou ne pas être, 日本語 日本, 🤷🏽 " * 4
TEXTS = st.text(alphabet="tobe ,\né日本🤷🏽\N{REPLACEMENT CHARACTER}", max_size=20)
sizes = st.lists(st.integers(1, 5), min_size=1)
examples = settings(deadline=None, derandomize=True, max_examples=200)


@functools.cache
def byte_tokenizer():
    """That of the embedded preset."""
    return Mamba2Tokenizer(byte_vocabulary(END), []).engine


@functools.cache
def byte_level():
    """As that of GPT-NeoX: tokens of several bytes, which begin and end inside of characters."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator([SAMPLE], trainer)
    return engine


@functools.cache
def metaspace():
    """As those of sentencepiece: the first token of a text loses its blank."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.decoder = decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=[END, "<unk>"], show_progress=False
    )
    engine.train_from_iterator([SAMPLE], trainer)
    return engine


@functools.cache
def byte_fallback():
    """As that of Llama: what is not in the vocabulary is bytes; a text loses its first blank."""
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", "▁", *"tobe,"]
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: id for id, token in enumerate(tokens)},
            [],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    engine.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    engine.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return engine


ENGINES = {
    "bytes": byte_tokenizer,
    "byte level": byte_level,
    "metaspace": metaspace,
    "byte fallback": byte_fallback,
}


def decode(engine, ids):
    return engine.decode(list(ids), skip_special_tokens=False)


def streamed(engine, ids, sizes, skip=()):
    """What comes out while tokens go in, so many at a time; and what comes at the end."""
    stream, pieces, i = TextStream(functools.partial(decode, engine), skip), [], 0
    while i < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(ids[i : i + size]))
        i += size
    return pieces, stream.finish()


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@examples
@given(text=TEXTS, sizes=sizes)
def test_pieces_of_a_text_are_the_text(engine, text, sizes):
    ids = engine().encode(text, add_special_tokens=False).ids
    pieces, last = streamed(engine(), ids, sizes)
    assert "".join([*pieces, last]) == decode(engine(), ids)
    if text.isascii():
        assert not last, "nothing is held back without need"


@pytest.mark.parametrize("name", ["bytes", "byte level", "metaspace"])
@examples
@given(data=st.data(), sizes=sizes)
def test_pieces_of_any_tokens_are_their_text(name, data, sizes):
    """A model may also give tokens that are no text: bytes out of order, half a character."""
    engine = ENGINES[name]()
    ids = data.draw(st.lists(st.integers(0, engine.get_vocab_size() - 1), max_size=20))
    end = engine.token_to_id(END)
    whole = decode(engine, [id for id in ids if id != end])
    pieces, last = streamed(engine, ids, sizes, skip=[end])
    assert "".join([*pieces, last]) == whole
    for i in range(len(pieces)):  # so that nothing that was given must be taken back
        assert whole.startswith("".join(pieces[: i + 1]))


@examples
@given(ids=st.lists(st.integers(0, 262), max_size=20), sizes=sizes)
def test_fallback_to_bytes_takes_nothing_back(ids, sizes):
    """Where a byte spoils characters before it that were given, they stay, and the rest follows."""
    whole = decode(byte_fallback(), ids)
    pieces, last = streamed(byte_fallback(), ids, sizes)
    text = "".join([*pieces, last])
    if "\N{REPLACEMENT CHARACTER}" not in whole:
        assert text == whole
    assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces)


@pytest.mark.parametrize("name", ["bytes", "byte level", "byte fallback"])
def test_half_a_character_waits_for_the_end(name):
    engine = ENGINES[name]()
    ids = engine.encode("to €", add_special_tokens=False).ids[:-1]
    pieces, last = streamed(engine, ids, [1])
    assert "".join(pieces) == "to "
    assert set(last) == {"\N{REPLACEMENT CHARACTER}"}
    assert "".join([*pieces, last]) == decode(engine, ids)


@pytest.mark.parametrize("name", ["bytes", "byte level", "byte fallback"])
@pytest.mark.parametrize("value", [0xFF, 0xEF])
def test_what_never_becomes_a_character_does_not_wait_for_ever(monkeypatch, name, value):
    """Or each token would have all before it decoded again."""
    monkeypatch.setattr(text_stream, "MOST_OPEN", 64)
    engine, decoded = ENGINES[name](), []
    if name == "bytes":
        one = value
    else:
        token = f"<0x{value:02X}>" if name == "byte fallback" else "\u00ff\u00ef"[value == 0xEF]
        one = engine.token_to_id(token)
    assert one is not None

    def counted(ids):
        decoded.append(len(ids))
        return decode(engine, ids)

    stream = TextStream(counted)
    pieces = [stream.push([one]) for _ in range(1000)]
    assert "".join([*pieces, stream.finish()]) == decode(engine, [one] * 1000)
    assert sum(map(bool, pieces)) >= 1000 // 64 - 1
    assert sum(decoded) < 1000 * 3 * 64


def steps(engine, ids):
    stream = decoders.DecodeStream(skip_special_tokens=False)
    return "".join(stream.step(engine, id) or "" for id in ids)


def test_the_library_does_not_give_the_end_of_a_text():
    ids = list("to é".encode())[:-1]
    assert decode(byte_tokenizer(), ids) == "to \N{REPLACEMENT CHARACTER}"
    assert steps(byte_tokenizer(), ids) == "to "  # and it has no method for the rest


def test_the_library_raises_where_bytes_spoil_what_it_gave():
    ids = [*"é".encode(), 0xFF, byte_fallback().token_to_id("t")]
    with pytest.raises(Exception, match="Invalid prefix"):
        steps(byte_fallback(), ids)
    pieces, last = streamed(byte_fallback(), ids, [1])
    assert "".join([*pieces, last]) == "é" + 2 * "\N{REPLACEMENT CHARACTER}" + "t"
