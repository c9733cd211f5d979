from collections.abc import Sequence

import numpy as np
import tokenizers

from keras_mamba2.portable.manifest import Tokens


class Codec:
    """Texts as token ids and back, as the model's preprocessor does it.

    Args:
        file: path of a `tokenizer.json`.
        tokens: what the file does not tell.
    """

    def __init__(self, file, tokens: Tokens):
        self.tokens = tokens
        self._engine = tokenizers.Tokenizer.from_file(str(file))

    def encode(self, texts: Sequence[str], continued: bool) -> list[np.ndarray]:
        """The token ids of each text; one that continues another has none before it."""
        first = () if continued else self.tokens.start
        rows = self._engine.encode_batch_fast(list(texts), add_special_tokens=not continued)
        return [np.array([*first, *row.ids], "int32") for row in rows]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._engine.decode(list(token_ids), skip_special_tokens=False)

    def texts(self, rows: Sequence[np.ndarray]) -> list[str]:
        """The text of each row, without the tokens that are none."""
        special = self.tokens.special
        return [self.decode([int(id) for id in row if id not in special]) for row in rows]
