"""How the weights of a checkpoint correspond to variables: names, and what changes between."""

import re
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import keras
import numpy as np


class Layout(NamedTuple):
    """How an array is laid out in a file and in a variable: two views of the same numbers."""

    to_variable: Callable[[np.ndarray], np.ndarray]
    to_file: Callable[[np.ndarray], np.ndarray]

    def file_shape(self, variable_shape: Iterable[int]) -> tuple[int, ...]:
        """The shape in the file of what has `variable_shape` in the model."""
        return self.to_file(np.broadcast_to(np.int8(0), tuple(variable_shape))).shape


SAME = Layout(lambda a: a, lambda a: a)
LINEAR = Layout(lambda a: a.swapaxes(-1, -2), lambda a: a.swapaxes(-1, -2))  # (out in) <-> (in out)
CONV = Layout(lambda a: a[:, 0].T, lambda a: a.T[:, None])  # (c 1 k) <-> (k c)


# What is computed from the configuration, and some files hold all the same.
BUFFERS = r"(.*\.)?rotary_emb\.inv_freq"


class Weight(NamedTuple):
    """How a table describes one weight: its name in a file, and its layout there."""

    name: str  # with `{expert}` where each expert has a tensor of its own
    layout: Layout = SAME
    part: int = 0  # which of the parts of the tensor's rows (out) it is
    parts: tuple[int, ...] = (1,)  # how large they are, beside one another
    parameter: str | None = None  # its name in transformers' memory, if it is no module's weight


def _rows_axis(shape: Sequence[int]) -> int:
    """The axis of a tensor's rows (out): of a bias the only one, of a matrix the first of two."""
    return max(len(shape) - 2, 0)


class Piece(NamedTuple):
    """A tensor of a file, or a part of one, and where it lies in a variable."""

    weight: Weight
    name: str
    item: int | None = None  # of the variable's first axis; `None` for the whole variable

    def file_shape(self, variable_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole tensor in the file."""
        shape = tuple(variable_shape) if self.item is None else tuple(variable_shape)[1:]
        shape = self.weight.layout.file_shape(shape)
        part, parts = self.weight.part, self.weight.parts
        if len(parts) == 1:
            return shape
        axis = _rows_axis(shape)
        rows = shape[axis] * sum(parts) // parts[part]
        return (*shape[:axis], rows, *shape[axis + 1 :])

    def of_file(self, tensor: np.ndarray) -> np.ndarray:
        """The view of this piece in the whole tensor of the file."""
        part, parts = self.weight.part, self.weight.parts
        if len(parts) == 1:
            return tensor
        axis = _rows_axis(tensor.shape)
        unit = tensor.shape[axis] // sum(parts)
        begin = unit * sum(parts[:part])
        return tensor[(slice(None),) * axis + (slice(begin, begin + unit * parts[part]),)]

    def of_variable(self, value: np.ndarray) -> np.ndarray:
        """The view of this piece in the variable's value."""
        return value if self.item is None else value[self.item]


class Names(NamedTuple):
    """The names that one library has for the weights of an architecture.

    Args:
        outside: variable path -> `Weight`, for what is not in a block.
        layers: string, what the names of a layer begin with, `{}` its number.
        blocks: for each block of a layer, end of a variable path -> `Weight` below `layers`.
        ignored: regular expression for tensors that no model here has, beside `BUFFERS`.
        renamed: strings, what names begin with in files, and then in transformers' memory.
        copies: what names of tensors begin with that some files hold again -> what those begin with
            that they are copies of.
    """

    outside: Mapping[str, Weight]
    layers: str
    blocks: Sequence[Mapping[str, Weight]]
    ignored: str = "(?!)"
    renamed: tuple[str, str] = ("", "")
    copies: Mapping[str, str] = MappingProxyType({})

    def pieces(self, variable: keras.Variable) -> list[Piece]:
        """What fills `variable`.

        Raises:
            ValueError: for a variable that checkpoints do not have, as those of LoRA and
                quantization.
        """
        weight, prefix = self.weight(variable.path)
        if "{expert}" not in weight.name:
            return [Piece(weight, prefix + weight.name)]
        return [
            Piece(weight, prefix + weight.name.format(expert=i), i)
            for i in range(variable.shape[0])
        ]

    def weight(self, path: str) -> tuple[Weight, str]:
        """The `Weight` of the variable at `path`, and what its name begins with."""
        block = re.fullmatch(r"block_(\d+)/(?:sublayers/)?(.+)", path)
        table, prefix, end = self.outside, "", path
        if block:
            layer, i = divmod(int(block[1]), len(self.blocks))
            table, prefix, end = self.blocks[i], self.layers.format(layer), block[2]
        if end not in table:
            raise ValueError(
                "A checkpoint has no place for this variable; models with LoRA adapters or "
                "quantized weights have such ones. Call `backbone.merge_lora()` first, or "
                "`save_peft_adapter`; export a model before it is quantized. "
                f"Received: path={path!r}"
            )
        return table[end], prefix

    def in_files_of(self, tensors: Collection[str]) -> "Names":
        """These names, as some files spell them: see `in_memory`, and those of a base model.

        A base model has no head, and its names do not tell what they are below.
        """
        names = self
        parameters = tuple(
            weight.parameter
            for table in self.blocks
            for weight in table.values()
            if weight.parameter
        )
        is_in_memory = parameters and any(name.endswith(parameters) for name in tensors)
        if is_in_memory or self.renamed_name(self.embedding) in tensors:
            names = self._respelled(*self.renamed, parameters=bool(is_in_memory))
        base = names.embedding.split(".")[0] + "."
        if names.embedding not in tensors and names.embedding.removeprefix(base) in tensors:
            names = names._respelled(base, "")
        return names

    def _respelled(self, old: str, new: str, parameters: bool = False) -> "Names":
        """With `new` where names begin with `old`; stacked `parameters` by their names."""

        def name(text: str) -> str:
            return new + text.removeprefix(old) if text.startswith(old) else text

        def table(weights: Mapping[str, Weight]) -> dict[str, Weight]:
            return {
                path: weight._replace(
                    name=name((weight.parameter if parameters else None) or weight.name)
                )
                for path, weight in weights.items()
            }

        return self._replace(
            outside=table(self.outside),
            layers=name(self.layers),
            blocks=[table(block) for block in self.blocks],
            copies={name(copy): name(original) for copy, original in self.copies.items()},
        )

    def in_memory(self, path: str) -> str:
        """What transformers calls the module of the variable at `path`, or the parameter."""
        weight, prefix = self.weight(path)
        return self.renamed_name(prefix + (weight.parameter or weight.name.removesuffix(".weight")))

    def renamed_name(self, name: str) -> str:
        """A name in transformers' memory, of one in a file."""
        in_file, in_memory = self.renamed
        return in_memory + name.removeprefix(in_file) if name.startswith(in_file) else name

    def is_vocabulary(self, name: str) -> bool:
        """Whether the rows of a tensor are tokens."""
        return name in (self.embedding, self.head)

    @property
    def embedding(self) -> str:
        return self.outside["token_embedding/embeddings"].name

    @property
    def head(self) -> str:
        return self.outside["token_embedding/reverse_embeddings"].name


def outside(embedding: str, final_norm: str, head: str = "lm_head.weight") -> dict[str, Weight]:
    """The weights outside blocks."""
    return {
        "token_embedding/embeddings": Weight(embedding),
        "token_embedding/reverse_embeddings": Weight(head, LINEAR),  # (v d) <-> (d v)
        "final_norm/scale": Weight(final_norm),
    }


def linear(path: str, name: str) -> dict[str, Weight]:
    """A projection with its bias, which not every model has."""
    return {
        f"{path}/kernel": Weight(f"{name}.weight", LINEAR),
        f"{path}/bias": Weight(f"{name}.bias"),
    }


def mixer(path: str, name: str) -> dict[str, Weight]:
    """A Mamba-2 mixer, which every library has with the same names."""
    return {
        **linear(f"{path}/in_proj", f"{name}.in_proj"),
        f"{path}/conv_kernel": Weight(f"{name}.conv1d.weight", CONV),
        f"{path}/conv_bias": Weight(f"{name}.conv1d.bias"),
        f"{path}/A_log": Weight(f"{name}.A_log"),
        f"{path}/dt_bias": Weight(f"{name}.dt_bias"),
        f"{path}/D": Weight(f"{name}.D"),
        f"{path}/norm/scale": Weight(f"{name}.norm.weight"),
        **linear(f"{path}/out_proj", f"{name}.out_proj"),
    }


def attention(path: str, name: str) -> dict[str, Weight]:
    """Attention with a projection each for queries, keys, values and output."""
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    tables = [linear(f"{path}/{ours}", f"{name}.{theirs}") for ours, theirs in parts.items()]
    return {key: weight for table in tables for key, weight in table.items()}


def mlp(path: str, name: str) -> dict[str, Weight]:
    """An MLP, gated or not."""
    tables = [linear(f"{path}/{part}", f"{name}.{part}_proj") for part in ("gate", "up", "down")]
    return {key: weight for table in tables for key, weight in table.items()}
