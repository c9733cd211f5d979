"""A Mamba-2 for llama.cpp: the GGUF file of a model's weights, and greedy decoding from it."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf.quants import quantize

from benchmarks.workload import Workload

MAX_TOKENS = 2**20  # sizes nothing in a model without attention
# What llama.cpp keeps in float32 whatever the type of the file, as its own converter.
FLOAT32 = (
    "ssm_conv1d.weight",
    "ssm_conv1d.bias",
    "ssm_dt.bias",
    "ssm_a",
    "ssm_d",
    "ssm_norm.weight",
)
FLOAT32 += ("attn_norm.weight", "output_norm.weight")

Weight = Callable[[str, tuple[int, ...]], np.ndarray]  # (name, shape) -> float32


def write_gguf(path: Path, workload: Workload, type_name: str, weight: Weight) -> None:
    """Writes the weights that `weight` returns by name, those of blocks one after the other.

    Args:
        path: of the file.
        workload: the shapes.
        type_name: of `gguf.GGMLQuantizationType`, for matrices: F32, BF16, Q8_0.
        weight: the weights by llama.cpp's names.
    """
    d, e, n, h, k = workload.letters()
    kind = gguf.GGMLQuantizationType[type_name]
    writer = gguf.GGUFWriter(path, "mamba2")
    writer.add_context_length(MAX_TOKENS)
    writer.add_vocab_size(workload.vocabulary_size)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(workload.num_layers)
    writer.add_ssm_conv_kernel(k)
    writer.add_ssm_inner_size(e)
    writer.add_ssm_state_size(n)
    writer.add_ssm_time_step_rank(h)
    writer.add_ssm_group_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("none")
    block = {
        "attn_norm.weight": (d,),
        "ssm_in.weight": (2 * e + 2 * n + h, d),
        "ssm_conv1d.weight": (e + 2 * n, k),
        "ssm_conv1d.bias": (e + 2 * n,),
        "ssm_dt.bias": (h,),
        "ssm_a": (h, 1),
        "ssm_d": (h, 1),
        "ssm_norm.weight": (1, e),
        "ssm_out.weight": (d, e),
    }
    shapes = {"token_embd.weight": (workload.vocabulary_size, d), "output_norm.weight": (d,)}
    for i in range(workload.num_layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        small = name.endswith(FLOAT32)
        stored = gguf.GGMLQuantizationType.F32 if small else kind
        writer.add_tensor(name, quantize(weight(name, shape), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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

    def start(self, batch_size: int) -> None:
        """Forgets everything; what comes is `batch_size` rows from their beginnings."""
        if self.context:
            llama_cpp.llama_free(self.context)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = MAX_TOKENS
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
