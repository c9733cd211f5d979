"""Models in llama.cpp: the calls of its C library on a GGUF file."""

import ctypes
import os
from pathlib import Path

import llama_cpp
import numpy as np

from benchmarks.gguf_tensors import MAX_TOKENS

FLOAT32 = 0  # of `ggml_type`
NO_FLASH = 0  # of `llama_flash_attn_type`


class LlamaCpp:
    """A loaded file, whose rows `(b t)` go on together: one call of `advance` after another."""

    def __init__(self, path: Path):
        llama_cpp.llama_log_set(_SILENT, None)
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}.")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.context = None

    def start(self, batch_size: int, max_tokens: int = MAX_TOKENS) -> None:
        """Forgets everything; what comes is `batch_size` rows from their beginnings.

        Args:
            batch_size: the number of rows.
            max_tokens: that a row can have. Sizes keys and values, and nothing without attention.
        """
        if self.context:
            llama_cpp.llama_free(self.context)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = min(batch_size * max_tokens, MAX_TOKENS)
        # Attention in float32, as others compute it: by default llama.cpp keeps keys and values in
        # float16, and its flash attention rounds products to float16.
        parameters.type_k = parameters.type_v = FLOAT32
        parameters.flash_attn_type = NO_FLASH
        parameters.n_seq_max = batch_size
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = os.cpu_count()
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.position = 0

    def advance(self, token_ids: np.ndarray) -> np.ndarray:
        """The logits `(b v)` after more tokens `(b t)`."""
        b = len(token_ids)
        pieces = np.split(token_ids, range(512 // b, token_ids.shape[1], 512 // b), axis=1)
        for piece in pieces:
            logits = self._advance(piece)
        return logits

    def _advance(self, token_ids: np.ndarray) -> np.ndarray:
        b, t = token_ids.shape
        batch = llama_cpp.llama_batch_init(b * t, 0, 1)
        batch.n_tokens = b * t
        for i in range(b * t):
            row, position = divmod(i, t)
            batch.token[i] = token_ids[row, position]
            batch.pos[i] = self.position + position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = position == t - 1
        failed = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}.")
        self.position += t
        last = [llama_cpp.llama_get_logits_ith(self.context, (i + 1) * t - 1) for i in range(b)]
        return np.stack([np.ctypeslib.as_array(row, (self.vocabulary_size,)) for row in last])


@llama_cpp.llama_log_callback
def _SILENT(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """llama.cpp tells a hundred lines about every model."""
