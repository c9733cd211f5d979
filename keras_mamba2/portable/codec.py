from collections.abc import Sequence

import numpy as np
import tokenizers

from keras_mamba2.host.continued import continued_ids
from keras_mamba2.host.text_stream import text_after
from keras_mamba2.portable.manifest import Tokens


class Codec:
    """Texts as token ids and back, as the model's preprocessor does it.

    Args:
        file: path of a `tokenizer.json`.
        tokens: what the file does not tell.
    """

    def __init__(self, file, tokens: Tokens):
        self.tokens = tokens
        try:
            self._engine = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no other class
            raise ValueError(
                f"{file} cannot be read by tokenizers {tokenizers.__version__}: {error}. Install "
                "the version with which it was written, or a newer one."
            ) from error

    def encode(self, texts: Sequence[str], continued: bool) -> list[np.ndarray]:
        """The token ids of each text; one that continues another has nothing before it."""
        if continued:
            return [np.array(row, "int32") for row in continued_ids(self._engine, texts)]
        rows = self._engine.encode_batch_fast(list(texts))
        return [np.array([*self.tokens.start, *row.ids], "int32") for row in rows]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._engine.decode(list(token_ids), skip_special_tokens=False)

    def texts(self, rows: Sequence[np.ndarray], before: Sequence[np.ndarray]) -> list[str]:
        """The text of each row, after other tokens, without the tokens that are none."""
        pairs = zip(before, rows, strict=True)
        return [text_after(*pair, self.decode, self.tokens.special) for pair in pairs]
