"""The token ids of texts that continue others."""

from collections.abc import Sequence

# Tokens that stand for a blank begin with it: of sentencepiece, and of byte-level tokenizers.
BLANKS = ("▁", "Ġ")
# What a text may stand behind. A line break is rarely merged with what follows, but with another.
SENTINELS = ("\n", ".", "a")


def continued_ids(engine, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, with nothing before them.

    Some tokenizers put a blank before every text, as if a word began there. Text that continues
    another is encoded behind a character, whose tokens are then left out.

    Args:
        engine: a `tokenizers.Tokenizer`.
        texts: sequence of strings.
    """

    def encode(text: str) -> list[int]:
        return engine.encode(text, add_special_tokens=False).ids

    def behind_another(text: str) -> list[int]:
        for sentinel in SENTINELS:
            before, ids = encode(sentinel), encode(sentinel + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return encode(text)

    first = engine.encode("a", add_special_tokens=False).tokens[:1]
    puts_blank = any(token.startswith(BLANKS) for token in first)
    return list(map(behind_another if puts_blank else encode, texts))
