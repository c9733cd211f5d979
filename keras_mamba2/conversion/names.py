"""One table of weight name <-> variable path, with what changes between the two layouts."""

import re
from collections.abc import Callable
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from keras_mamba2.conversion.config import STATE_SPACES
from keras_mamba2.conversion.config import TRANSFORMERS

HEAD = "lm_head.weight"
EMBEDDING = {
    TRANSFORMERS: "backbone.embeddings.weight",
    STATE_SPACES: "backbone.embedding.weight",
}


class Layout(NamedTuple):
    """How an array is laid out in a file and in a variable: two views of the same numbers."""

    to_variable: Callable[[np.ndarray], np.ndarray]
    to_file: Callable[[np.ndarray], np.ndarray]

    def file_shape(self, variable_shape: Iterable[int]) -> tuple[int, ...]:
        """The shape in the file of what has `variable_shape` in the model."""
        return self.to_file(np.broadcast_to(np.int8(0), tuple(variable_shape))).shape


SAME = Layout(lambda a: a, lambda a: a)
LINEAR = Layout(lambda a: a.T, lambda a: a.T)  # (out in) <-> (in out)
CONV = Layout(lambda a: a[:, 0].T, lambda a: a.T[:, None])  # (c 1 k) <-> (k c)

# Variable path -> (weight name, layout). In a block: below `block_N/` and `backbone.layers.N.`.
BLOCK = {
    "norm/scale": ("norm.weight", SAME),
    "mixer/in_proj/kernel": ("mixer.in_proj.weight", LINEAR),
    "mixer/in_proj/bias": ("mixer.in_proj.bias", SAME),
    "mixer/conv_kernel": ("mixer.conv1d.weight", CONV),
    "mixer/conv_bias": ("mixer.conv1d.bias", SAME),
    "mixer/A_log": ("mixer.A_log", SAME),
    "mixer/dt_bias": ("mixer.dt_bias", SAME),
    "mixer/D": ("mixer.D", SAME),
    "mixer/norm/scale": ("mixer.norm.weight", SAME),
    "mixer/out_proj/kernel": ("mixer.out_proj.weight", LINEAR),
    "mixer/out_proj/bias": ("mixer.out_proj.bias", SAME),
}
OUTSIDE = {
    "token_embedding/embeddings": (EMBEDDING, SAME),
    "token_embedding/reverse_embeddings": (HEAD, LINEAR),  # (v d) <-> (d v)
    "final_norm/scale": ("backbone.norm_f.weight", SAME),
}


def spelling_of(names: Iterable[str]) -> str:
    """The format, `"transformers"` or `"state-spaces"`, that spells weight names like this."""
    return STATE_SPACES if EMBEDDING[STATE_SPACES] in names else TRANSFORMERS


def weight_name(path: str, spelling: str = TRANSFORMERS) -> tuple[str, Layout]:
    """The name in a checkpoint of the variable at `path`, and the change of layout.

    Raises:
        ValueError: for a variable that checkpoints do not have, as those of LoRA and
            quantization.
    """
    block = re.fullmatch(r"block_(\d+)/(.+)", path)
    if block and block[2] in BLOCK:
        name, layout = BLOCK[block[2]]
        return f"backbone.layers.{block[1]}.{name}", layout
    if path not in OUTSIDE:
        raise ValueError(
            "A checkpoint has no place for this variable; models with LoRA adapters or quantized "
            "weights have such ones. Call `backbone.merge_lora()` first, or `save_peft_adapter`; "
            f"export a model before it is quantized. Received: path={path!r}"
        )
    name, layout = OUTSIDE[path]
    return (name[spelling] if path == "token_embedding/embeddings" else name), layout
