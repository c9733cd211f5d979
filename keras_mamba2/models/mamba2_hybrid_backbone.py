from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import ClassVar

import keras
import numpy as np

from keras_mamba2.arguments import STRING
from keras_mamba2.arguments import instance
from keras_mamba2.arguments import several
from keras_mamba2.layers.attention import Attention
from keras_mamba2.layers.fed_block import FedBlock
from keras_mamba2.layers.gated_rms_normalization import GatedRMSNormalization
from keras_mamba2.layers.hybrid_block import HybridBlock
from keras_mamba2.layers.mamba2_mixer import Mamba2Mixer
from keras_mamba2.layers.mixture_of_experts import MixtureOfExperts
from keras_mamba2.layers.mlp import MLP
from keras_mamba2.layers.parallel import Parallel
from keras_mamba2.layers.shared_transformer import SharedTransformer
from keras_mamba2.layers.sublayer import Sublayer
from keras_mamba2.models.kept_dtypes import set_kept_dtypes
from keras_mamba2.models.residual_backbone import ResidualBackbone
from keras_mamba2.models.residual_backbone import checked_tokens
from keras_mamba2.models.residual_backbone import embedding
from keras_mamba2.models.residual_backbone import own_dtype

# What may stand in a block, by the name that a configuration has for it. A new kind of layer is a
# `Sublayer` in a file of its own, and a line here.
KINDS = {
    "mamba2": Mamba2Mixer,
    "attention": Attention,
    "mlp": MLP,
    "mixture_of_experts": MixtureOfExperts,
    "shared_transformer": SharedTransformer,
}
JOINT, FEEDS = "+", ">"
MULTIPLIERS = ("input_multiplier", "output_multiplier")
OWN_KEYS = ("kind", *MULTIPLIERS)


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2HybridBackbone(ResidualBackbone):
    """A language model of Mamba-2 mixers, attention, MLPs and experts, without its head.

    Every block adds something to the residual stream: a sublayer, or several in parallel, of the
    block's normalized input. `sublayers` says what there is, under names, and `blocks` where.

    Args:
        vocabulary_size: int, v, the rows of the embedding.
        hidden_dim: int, d.
        blocks: list of strings, the name of the sublayer of each block, or names joined by `"+"`.
            `"a>b"` for what `keras_mamba2.layers.FedBlock` makes of `a`, a
            `keras_mamba2.layers.SharedTransformer`, and `b`.
        sublayers: dict, the arguments of each named sublayer but `hidden_dim`. `"kind"` is
            `"mamba2"` (`keras_mamba2.layers.Mamba2Mixer`), `"attention"`
            (`keras_mamba2.layers.Attention`), `"mlp"` (`keras_mamba2.layers.MLP`),
            `"mixture_of_experts"` (`keras_mamba2.layers.MixtureOfExperts`) or
            `"shared_transformer"` (`keras_mamba2.layers.SharedTransformer`, whose blocks of one
            name share weights); without it the name is the kind. `"input_multiplier"` and
            `"output_multiplier"` scale what goes in and comes out.
        layer_norm_epsilon: float, of the norms; of the gated norms too, where they say no other.
        embedding_multiplier: float, embeddings are multiplied by it.
        residual_multiplier: float, what blocks add is multiplied by it.
        logits_multiplier: float, logits are multiplied by it.
        residual_in_fp32: bool, whether the residual stream is float32 whatever the dtype policy.
        tie_word_embeddings: bool, whether the head is the transposed embedding.
        unpadded_vocabulary_size: int, ids from here up to v are rows that only pad the embedding,
            and are never sampled, unless a model's tokenizer has tokens for them. `None` for v.
        dropout: float, the rate at which embeddings and the outputs of blocks are dropped in
            training.
        remat: bool, whether the inside of blocks is computed again in the backward pass.
        key_value_dtype: `"int8"`, in which states keep the keys and values of all attention, at
            half the bytes of bfloat16. `None` for the compute dtype.
        state_dtype: `"bfloat16"`, in which states keep what mixers remember, in half the bytes,
            rounded stochastically. `None` for float32.
        dtype: string or `keras.DTypePolicy`.
        **kwargs: `name` and `trainable`.

    Call arguments:
        token_ids: int tensor `(b t)`.
        padding_mask: int tensor `(b t)`, as in `keras_mamba2.Mamba2Backbone`.
        segment_ids: optional int tensor `(b t)`, as there.

    Example:
    ```python
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=256,
        hidden_dim=64,
        blocks=["mamba2", "mlp", "attention", "mlp"],
        sublayers={
            "mamba2": {"state_dim": 32, "head_dim": 16},
            "attention": {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
            "mlp": {"intermediate_dim": 128},
        },
    )
    ```

    Reference:
        - [Waleffe et al., 2024](https://arxiv.org/abs/2406.07887)
    """

    kinds: ClassVar[Mapping[str, type[Sublayer]]] = KINDS
    sublayers = tuple(KINDS.values())

    def __init__(
        self,
        vocabulary_size: int,
        hidden_dim: int,
        blocks: Sequence[str],
        sublayers: Mapping[str, Mapping[str, Any]],
        layer_norm_epsilon: float = 1e-5,
        embedding_multiplier: float = 1.0,
        residual_multiplier: float = 1.0,
        logits_multiplier: float = 1.0,
        residual_in_fp32: bool = True,
        tie_word_embeddings: bool = True,
        unpadded_vocabulary_size: int | None = None,
        dropout: float = 0.0,
        remat: bool = False,
        state_dtype: str | None = None,
        key_value_dtype: str | None = None,
        dtype=None,
        **kwargs,
    ):
        dtype = own_dtype(dtype)
        unpadded_vocabulary_size = checked_tokens(vocabulary_size, unpadded_vocabulary_size)
        _check_blocks(blocks, sublayers)
        self.embedding_multiplier = embedding_multiplier
        self.logits_multiplier = logits_multiplier

        # === Layers ===
        token_embedding, embeddings_dropout = embedding(
            vocabulary_size, hidden_dim, tie_word_embeddings, dropout, dtype
        )
        make = _Maker(sublayers, hidden_dim, layer_norm_epsilon, dtype)
        block_layers = [
            make.block(
                names,
                residual_in_fp32=residual_in_fp32,
                residual_multiplier=residual_multiplier,
                dropout=dropout,
                remat=remat,
                name=f"block_{i}",
            )
            for i, names in enumerate(blocks)
        ]
        norm = GatedRMSNormalization(epsilon=layer_norm_epsilon, dtype=dtype, name="final_norm")
        super().__init__(
            token_embedding, embeddings_dropout, block_layers, norm, dtype=dtype, **kwargs
        )

        # === Config ===
        self.vocabulary_size = vocabulary_size
        self.hidden_dim = hidden_dim
        self.block_names = list(blocks)
        self.sublayer_arguments = {name: dict(values) for name, values in sublayers.items()}
        self.layer_norm_epsilon = layer_norm_epsilon
        self.residual_multiplier = residual_multiplier
        self.residual_in_fp32 = residual_in_fp32
        self.tie_word_embeddings = tie_word_embeddings
        self.unpadded_vocabulary_size = unpadded_vocabulary_size
        self.dropout = dropout
        self.remat = remat
        set_kept_dtypes(self, state_dtype=state_dtype, key_value_dtype=key_value_dtype)

    @property
    def architecture(self) -> str:
        """The sizes in words, so that an error can name them."""
        return (
            f"{type(self).__name__}(vocabulary_size={self.vocabulary_size}, "
            f"hidden_dim={self.hidden_dim}, blocks={self.block_names}, "
            f"sublayers={_plain(self.sublayer_arguments)}, dtype={self.compute_dtype})"
        )

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "vocabulary_size": self.vocabulary_size,
                "hidden_dim": self.hidden_dim,
                "blocks": self.block_names,
                "sublayers": self.sublayer_arguments,
                "layer_norm_epsilon": self.layer_norm_epsilon,
                "embedding_multiplier": self.embedding_multiplier,
                "residual_multiplier": self.residual_multiplier,
                "logits_multiplier": self.logits_multiplier,
                "residual_in_fp32": self.residual_in_fp32,
                "tie_word_embeddings": self.tie_word_embeddings,
                "unpadded_vocabulary_size": self.unpadded_vocabulary_size,
                "dropout": self.dropout,
                "remat": self.remat,
                "state_dtype": self.state_dtype,
                "key_value_dtype": self.key_value_dtype,
            }
        )
        return config


def _names_in(block: str) -> list[str]:
    """The names of all sublayers of a block."""
    return block.replace(FEEDS, JOINT).split(JOINT)


def _check_blocks(blocks: Sequence[str], sublayers: Mapping[str, Mapping[str, Any]]) -> None:
    several(STRING)("blocks", blocks)
    mapping = instance(Mapping, "a dict of the arguments of each sublayer")
    for name, arguments in mapping("sublayers", sublayers).items():
        instance(Mapping, "a dict of arguments")(f"sublayers[{name!r}]", arguments)
    if not len(blocks):
        raise ValueError("`blocks` is empty: a model needs at least one block.")
    for name, arguments in sublayers.items():
        if arguments.get("kind", name) not in list(KINDS):
            raise ValueError(
                f"There is no sublayer of kind {arguments.get('kind', name)!r}. Known: "
                f"{', '.join(map(repr, KINDS))}. Received: sublayers[{name!r}]={dict(arguments)}"
            )
        unused = [key for key in MULTIPLIERS if arguments.get(key, 1.0) != 1.0]
        if unused and arguments.get("kind", name) == "shared_transformer":
            raise ValueError(
                f"A 'shared_transformer' has no {unused[0]!r}: what it gives goes into the block "
                f"that it feeds. Received: sublayers[{name!r}]={dict(arguments)}"
            )
    for i, block in enumerate(blocks):
        for name in _names_in(block):
            if name not in sublayers:
                raise ValueError(
                    f"Block {i} has a sublayer {name!r}, which `sublayers` does not describe. "
                    f"Described: {', '.join(map(repr, sublayers)) or 'none'}"
                )
        *feeders, fed = block.split(FEEDS)
        names = fed.split(JOINT)
        if len(set(names)) < len(names):
            raise ValueError(
                "A sublayer stands only once in a block. For a second one with weights of its own, "
                f"describe it in `sublayers` under another name. Received: blocks[{i}]={block!r}"
            )
        kinds = [sublayers[name].get("kind", name) for name in _names_in(fed)]
        feeder_kinds = [sublayers.get(name, {}).get("kind", name) for name in feeders]
        if "shared_transformer" in kinds or feeder_kinds not in ([], ["shared_transformer"]):
            raise ValueError(
                f"A 'shared_transformer', and nothing else, stands before one {FEEDS!r}. "
                f"Received: blocks[{i}]={block!r}"
            )


class _Maker:
    """Makes the layers of blocks. What is shared is made by the first that needs it."""

    def __init__(self, sublayers, hidden_dim: int, layer_norm_epsilon: float, dtype):
        self.sublayers = sublayers
        self.hidden_dim = hidden_dim
        self.common = {"layer_norm_epsilon": layer_norm_epsilon, "dtype": dtype}
        self.dtype = dtype
        self.shared: dict[str, SharedTransformer] = {}

    def block(self, names: str, **kwargs) -> HybridBlock:
        *feeder, fed = names.split(FEEDS)
        parallel = self.parallel(fed.split(JOINT))
        if not feeder:
            return HybridBlock(self.hidden_dim, parallel, **self.common, **kwargs)
        feeder = self.shared_transformer(feeder[0])
        return FedBlock(self.hidden_dim, parallel, feeder, **self.common, **kwargs)

    def parallel(self, names: Sequence[str]) -> Parallel:
        return Parallel(
            [self.sublayer(name) for name in names],
            [self.sublayers[name].get("input_multiplier", 1.0) for name in names],
            [self.sublayers[name].get("output_multiplier", 1.0) for name in names],
            dtype=self.dtype,
            name="sublayers",
        )

    def sublayer(self, name: str) -> Sublayer:
        kind, arguments = self._arguments(name)
        if kind is Mamba2Mixer:
            arguments = {"layer_norm_epsilon": self.common["layer_norm_epsilon"], **arguments}
        return kind(self.hidden_dim, **arguments, dtype=self.dtype, name=name)

    def shared_transformer(self, name: str) -> SharedTransformer:
        _, arguments = self._arguments(name)
        layer = SharedTransformer(
            self.hidden_dim,
            **{**self.common, **arguments},
            shared=self.shared.get(name),
            name="shared_transformer",
        )
        self.shared.setdefault(name, layer)
        return layer

    def _arguments(self, name: str):
        arguments = self.sublayers[name]
        own = {key: value for key, value in arguments.items() if key not in OWN_KEYS}
        return KINDS[arguments.get("kind", name)], own


def _plain(value: Any) -> Any:
    """`value` with tuples for lists and Python's numbers for numpy's.

    A configuration that was written as JSON and read again is the same.
    """
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value
