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

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [row.ids for row in engine.encode_batch_fast(texts, add_special_tokens=False)]

    rows = encode(list(texts))
    first = engine.encode("a", add_special_tokens=False).tokens[:1]
    if not any(token.startswith(BLANKS) for token in first):
        return rows
    left = list(range(len(rows)))
    for sentinel, before in zip(SENTINELS, encode(SENTINELS), strict=True):
        behind = zip(left, encode([sentinel + texts[i] for i in left]), strict=True)
        n = len(before)
        cut = {i: ids[n:] for i, ids in behind if before and ids[:n] == before}
        rows = [cut.get(i, row) for i, row in enumerate(rows)]
        left = [i for i in left if i not in cut]
    return rows
