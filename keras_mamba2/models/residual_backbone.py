import copy
import functools
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import ClassVar

import keras
import keras_hub
from keras import ops

from keras_mamba2._compat.keras_hub_presets import load_backbone
from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import OF_KERAS
from keras_mamba2.arguments import RATE
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import STRING
from keras_mamba2.arguments import check_keywords
from keras_mamba2.arguments import number
from keras_mamba2.arguments import optional
from keras_mamba2.arguments import several
from keras_mamba2.arguments import shown
from keras_mamba2.atomic_files import atomic_file
from keras_mamba2.conversion import WholeWeights
from keras_mamba2.conversion import building
from keras_mamba2.conversion import load_preset
from keras_mamba2.conversion import open_preset
from keras_mamba2.host.inputs import standard_names
from keras_mamba2.host.room import room_for
from keras_mamba2.layers.gated_rms_normalization import GatedRMSNormalization
from keras_mamba2.layers.residual_block import ResidualBlock
from keras_mamba2.layers.reversible_embedding import ReversibleEmbedding
from keras_mamba2.layers.sublayer import Sublayer
from keras_mamba2.models import lora
from keras_mamba2.models import quantization
from keras_mamba2.models.kept_dtypes import kept_dtype
from keras_mamba2.models.layout import check_layout
from keras_mamba2.models.layout import layout_map
from keras_mamba2.models.stacked_blocks import StackedBlocks
from keras_mamba2.models.stacked_blocks import WeightsApart
from keras_mamba2.models.stacked_blocks import check_apart
from keras_mamba2.ops.open_chunk import put_tokens
from keras_mamba2.saving import BACKBONE_FILES
from keras_mamba2.saving import AtomicPreset
from keras_mamba2.saving import AtomicSave
from keras_mamba2.state import NO_TOKEN
from keras_mamba2.state import STATE
from keras_mamba2.state import Mamba2State
from keras_mamba2.state import OpenChunk
from keras_mamba2.state.digest import digest_after


class ResidualBackbone(
    WeightsApart, AtomicPreset, AtomicSave, WholeWeights, keras_hub.models.Backbone
):
    """An embedding, residual blocks, and a norm. It knows no kind of layer.

    A subclass makes the layers from its configuration. All that a backbone does with them goes
    through `keras_mamba2.layers.Sublayer`.

    Args:
        token_embedding: `keras_mamba2.layers.ReversibleEmbedding`, not built yet.
        embeddings_dropout: `keras.layers.Dropout`.
        blocks: sequence of `keras_mamba2.layers.ResidualBlock`, not built yet.
        norm: `keras_mamba2.layers.GatedRMSNormalization`, not built yet.
        **kwargs: `dtype`, `name` and `trainable`.

    Call arguments:
        token_ids: int tensor `(b t)`.
        padding_mask: int tensor `(b t)`, as in `keras_mamba2.Mamba2Backbone`.
        segment_ids: optional int tensor `(b t)`, as there.
    """

    preset_files = BACKBONE_FILES
    # The kinds of sublayers that a model of this class may have.
    sublayers: ClassVar[tuple[type[Sublayer], ...]] = ()
    stacked: StackedBlocks | None = None
    # Of each layer with a LoRA adapter its path and alpha / rank, which programs have in them.
    adapter_scales: tuple[tuple[str, float], ...] = ()
    # A model that scales them sets these before `__init__`.
    embedding_multiplier = logits_multiplier = 1.0

    def __init__(
        self,
        token_embedding: ReversibleEmbedding,
        embeddings_dropout: keras.layers.Dropout,
        blocks: Sequence[ResidualBlock],
        norm: GatedRMSNormalization,
        **kwargs,
    ):
        check_keywords(type(self), kwargs)
        for name in ("embedding_multiplier", "logits_multiplier"):
            number()(name, getattr(self, name))
        _check_cuts(token_embedding, blocks)

        # === Layers ===
        self.token_embedding = token_embedding
        self.embeddings_dropout = embeddings_dropout
        self.blocks = list(blocks)
        self.norm = norm

        # === Functional Model ===
        token_id_input = keras.Input(shape=(None,), dtype="int32", name="token_ids")
        padding_mask_input = keras.Input(shape=(None,), dtype="int32", name="padding_mask")
        # Without `segment_ids`: KerasHub's tools expect the inputs that preprocessors make.
        inputs = {"token_ids": token_id_input, "padding_mask": padding_mask_input}
        with building():
            super().__init__(inputs=inputs, outputs=self.hidden_states(**inputs), **kwargs)
        self.input_spec = None  # Keras' own knows no other names; `standard_names` checks them

    @property
    def state_dtype(self) -> str | None:
        return kept_dtype(self, "state_dtype")

    @property
    def key_value_dtype(self) -> str | None:
        return kept_dtype(self, "key_value_dtype")

    def call(self, inputs, training=None):
        return self.hidden_states(**standard_names(inputs))  # Keras passes `training` on

    def hidden_states(self, token_ids, padding_mask, segment_ids=None, intercept=None):
        """The outputs `(b t d)`; `intercept` may replace those of each block, by its index."""
        intercept = intercept or (lambda x, i: x)
        x = embeddings = intercept(self.embeddings_dropout(self._embed(token_ids)), -1)
        for i, block in enumerate(self.blocks):
            seen = _seen_by(block, embeddings)
            x = block(x, padding_mask=padding_mask, segment_ids=segment_ids, **seen)
            x = intercept(x, i)
        return self.norm(x)

    def _embed(self, token_ids):
        x = self.token_embedding(token_ids)
        return x if self.embedding_multiplier == 1 else x * self.embedding_multiplier

    def logits(self, hidden_states):
        """The head: `(... v)` for hidden states `(... d)`, with those of ids that only pad."""
        logits = self.token_embedding(hidden_states, reverse=True)
        return logits if self.logits_multiplier == 1 else logits * self.logits_multiplier

    def call_with_state(
        self, token_ids, state: Mamba2State | None = None, padding_mask=None, segment_ids=None
    ):
        """Runs the model on `(b t)` token ids after `state`.

        Differentiable in the state too, but not through keys and values in int8. With
        `segment_ids`, `state` belongs to the first document of a row, and the returned one to the
        last.

        Returns:
            Tuple `(hidden_states, state)`: `(b t d)`, and the `Mamba2State` after each row's
            last real token.
        """
        optional(STATE)("state", state)
        b, t = ops.shape(token_ids)
        token = ops.full((b,), NO_TOKEN, "int32") if state is None else state.token
        length = ops.zeros((b,), "int32") if state is None else state.length
        digest = ops.zeros((b,), "int32") if state is None else state.digest
        if self.stacked is not None and state is None:
            state = self.initial_state(b, room_for(t + 1))
        layers = [None] * len(self.blocks) if state is None else state.layers
        x = embeddings = self.embeddings_dropout(self._embed(token_ids))

        def run(block, x, layer):
            seen = _seen_by(block, embeddings)
            return block.call_with_state(x, layer, padding_mask, segment_ids, **seen)

        x, layers = self._through(run, x, layers)
        seen = t if padding_mask is None else ops.count_nonzero(padding_mask, axis=1)
        length = length + ops.cast(seen, "int32")
        mask = None if padding_mask is None else ops.cast(padding_mask, "bool")
        digest = digest_after(digest, token_ids, mask)
        return self.norm(x), Mamba2State(layers, token, length, digest)

    def step(self, token_ids, state: Mamba2State, mask=None):
        """Runs the model on one token a row, `(b)`, after `state`.

        Where the boolean `mask` `(b)` is false, the state stays as it was.

        Returns:
            Tuple `(hidden_states, state)`: `(b d)`, and the `Mamba2State` after the token.
        """
        STATE("state", state)
        x = embeddings = self._embed(token_ids)

        def run(block, x, layer):
            return block.step(x, layer, mask, **_seen_by(block, embeddings))

        x, layers = self._through(run, x, state.layers)
        seen = 1 if mask is None else ops.cast(mask, "int32")
        digest = digest_after(
            state.digest, token_ids[:, None], None if mask is None else mask[:, None]
        )
        return self.norm(x), Mamba2State(layers, state.token, state.length + seen, digest)

    def extend(self, token_ids, state: Mamba2State, chunk: OpenChunk, start=0):
        """Runs the model on `(b t)` token ids that may be taken back.

        Args:
            token_ids: int tensor `(b t)`, which go to the places `start` to `start + t` of
                `chunk`.
            state: the `Mamba2State` before the chunk. It stays as it is.
            chunk: of `open_chunk`, or returned by `extend`, for the same `state`.
            start: int, or int scalar, how many tokens are in the chunk.

        Returns:
            Tuple `(hidden_states, chunk)`: `(b t d)`, and the chunk with the new tokens.
        """
        STATE("state", state)
        x = embeddings = self._embed(token_ids)

        def run(block, x, layer, part):
            return block.extend(x, layer, part, start, **_seen_by(block, embeddings))

        x, chunks = self._through(run, x, state.layers, chunk.layers)
        token_ids = put_tokens(chunk.token_ids, token_ids, start)
        return self.norm(x), OpenChunk(token_ids, tuple(chunks))

    def commit(self, state: Mamba2State, chunk: OpenChunk, count) -> Mamba2State:
        """The state after the first `count` `(b)` tokens of an open chunk."""
        _, layers = self._through(
            lambda block, x, part, layer: (x, block.commit(layer, part, count)),
            *(None, chunk.layers, state.layers),
        )
        is_taken = ops.arange(chunk.token_ids.shape[1]) < count[:, None]
        digest = digest_after(state.digest, chunk.token_ids, is_taken)
        return Mamba2State(layers, state.token, state.length + count, digest)

    def open_chunk(self, batch_size: int, size: int) -> OpenChunk:
        """An open chunk with room for `size` tokens of `batch_size` rows."""
        layers = [block.open_chunk(batch_size, size) for block in self.blocks]
        if self.stacked is not None:
            layers = [self.stacked.together(layers)]
        return OpenChunk(ops.zeros((batch_size, size), "int32"), tuple(layers))

    def _through(self, run: Callable, x, *parts):
        """As `StackedBlocks.through`, for blocks that are stacked or not."""
        if self.stacked is not None:
            return self.stacked.through(run, x, *parts)
        replaced = []
        for block, *its in zip(self.blocks, *parts, strict=True):
            x, part = run(block, x, *its)
            replaced.append(part)
        return x, replaced

    def stack_blocks(self) -> None:
        """As `Mamba2CausalLM.stack_blocks`."""
        if self.stacked is None:
            self.stacked = StackedBlocks(self.blocks)

    def value_of(self, variable: keras.Variable) -> Any:
        """The value of one of the backbone's variables, stacked or not."""
        return variable.value if self.stacked is None else self.stacked.value_of(variable)

    def in_loop(self, state: Mamba2State) -> Mamba2State:
        """`state` in the form in which the loop of a program keeps it from step to step."""
        if self.stacked is None:
            return state
        return Mamba2State(
            [self.stacked.together(state.layers)], state.token, state.length, state.digest
        )

    def after_loop(self, state: Mamba2State) -> Mamba2State:
        """The state that `in_loop` made into `state`."""
        if self.stacked is None:
            return state
        (layers,) = state.layers
        return Mamba2State(self.stacked.apart(layers), state.token, state.length, state.digest)

    def state_spec(self, max_length: int | None = None) -> tuple[Any, ...]:
        """What a state holds for one row: for each block the spec of its `Sublayer`."""
        return tuple(block.state_spec(max_length) for block in self.blocks)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> Mamba2State:
        """The state before the first token of `batch_size` rows, of up to `max_length` tokens."""
        SIZE("batch_size", batch_size)
        optional(SIZE)("max_length", max_length)
        return Mamba2State(
            [block.initial_state(batch_size, max_length) for block in self.blocks],
            token=ops.full((batch_size,), NO_TOKEN, "int32"),
            length=ops.zeros((batch_size,), "int32"),
            digest=ops.zeros((batch_size,), "int32"),
        )

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs) -> "ResidualBackbone":
        """Loads a backbone by name or folder. See `keras_hub.models.Backbone.from_preset`.

        `dtype="auto"` takes the dtype that the weights in the files have.
        """
        BOOLEAN("load_weights", load_weights)
        loader, preset = open_preset(preset, weights=load_weights, tokenizer=False)
        if loader is not None:
            if not issubclass(loader.backbone_class, cls):
                raise ValueError(
                    f"{preset} is a {loader.backbone_class.__name__}, not a {cls.__name__}: call "
                    "`from_preset` of that class."
                )
            return loader.load_backbone(cls, load_weights, **kwargs)
        load = functools.partial(load_backbone, cls, preset)
        return load_preset(load, preset, load_weights, kwargs)

    @classmethod
    def get_layout_map(
        cls,
        device_mesh: keras.distribution.DeviceMesh,
        model_parallel_dim_name: str = "model",
        data_parallel_dim_name: str = "batch",
        sequence_parallel_dim_name: str = "sequence",
    ) -> keras.distribution.LayoutMap:
        """How weights and sequences are distributed over the devices of a mesh.

        Its axes say what is cut. `data_parallel_dim_name` is always there: rows of the batch,
        and every matrix, so that weights, gradients and optimizer need a share of the memory
        (fully sharded). `model_parallel_dim_name` cuts heads and vocabulary (tensor parallel).
        `sequence_parallel_dim_name` cuts positions: each device runs its part of every sequence,
        if their number is divisible, and passes on the state.

        Args:
            device_mesh: `keras.distribution.DeviceMesh` with one or two of the axes.
            model_parallel_dim_name: string, the axis that cuts heads.
            data_parallel_dim_name: string, the axis that cuts the batch.
            sequence_parallel_dim_name: string, the axis that cuts sequences.

        Example:
        ```python
        mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "sequence"])
        layout_map = keras_mamba2.Mamba2Backbone.get_layout_map(mesh)
        distribution = keras.distribution.ModelParallel(layout_map=layout_map)
        with distribution.scope():
            lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_130m_en")
        ```
        """
        return layout_map(
            cls.sublayers,
            device_mesh,
            model_parallel_dim_name,
            data_parallel_dim_name,
            sequence_parallel_dim_name,
        )

    def default_lora_layer_names(self) -> list[str]:
        return sorted({layer.name for layer in lora.projections(self)})

    def enable_lora(self, rank: int, target_layer_names: Sequence[str] | None = None) -> None:
        """Freezes the model, and adds LoRA adapters to its projections, to be trained instead.

        Compile the model afterwards. A bias of a projection is frozen too, so that the adapters
        hold all that training changes.

        Args:
            rank: int.
            target_layer_names: sequence of strings, names of projections such as `"in_proj"` and
                `"out_proj"`. `None` for all.

        Raises:
            ValueError: for another name, if LoRA is enabled already, and for weights quantized
                to anything but int8 and int4.
        """
        rank = SIZE("rank", rank)
        optional(several(STRING))("target_layer_names", target_layer_names)
        names = (
            self.default_lora_layer_names() if target_layer_names is None else target_layer_names
        )
        lora.enable(self, {layer: (rank, rank) for layer in lora.projections_named(self, names)})

    def merge_lora(self) -> None:
        """Adds the LoRA adapters to the weights: the model is a plain one, with the same outputs.

        Everything is trainable again; compile the model before it is trained on. Weights in int8
        or int4 are quantized anew, so that outputs change by the rounding.
        """
        lora.merge(self)

    def save_lora_weights(self, filepath) -> None:
        """As `keras_hub.models.Backbone.save_lora_weights`: a file that ends in `.lora.h5`.

        The old file is as it was until the new one is whole.
        """
        check_apart(self)
        lora.check_uniform(self)
        if not str(filepath).endswith(".lora.h5"):  # of which KerasHub says what it thinks
            super().save_lora_weights(filepath)
            return
        with atomic_file(filepath) as temporary:
            super().save_lora_weights(str(temporary))

    def load_lora_weights(self, filepath) -> None:
        """Loads a file of `save_lora_weights`, and enables LoRA as it needs where it is not.

        Raises:
            ValueError: for the file of another model, and if LoRA is enabled on other layers than
                those in the file, with another rank, or an alpha that is not the rank.
        """
        lora.check_uniform(self)
        layers, rank = lora.read_file(self, filepath)
        if not lora.adapted_projections(self):
            lora.enable(self, {layer: (rank, rank) for layer in layers})
        super().load_lora_weights(filepath)

    def quantize(self, mode: str | None = None, config=None, filters=None, **kwargs) -> None:
        """As `Mamba2CausalLM.quantize`."""
        filters = quantization.prepare(self, config, filters)
        super().quantize(mode, config=config, filters=filters, **kwargs)
        quantization.remember_policies(self)

    def get_quantization_layer_structure(self, mode: str):
        return quantization.layer_structure(self, mode)


def _check_cuts(token_embedding: ReversibleEmbedding, blocks: Sequence[ResidualBlock]) -> None:
    """Raises, before a weight is made, if the current distribution would cut one unequally."""
    axes = {
        "vocabulary_size": token_embedding.input_dim,
        "hidden_dim": token_embedding.output_dim,
    }
    cuts: dict[str, Mapping[str, int]] = {"token_embedding/embeddings": axes}
    for block in blocks:
        for part in block.parts:
            for path, axes in part.weight_axes.items():
                cuts[f"{block.name}/{part.name}/{path}"] = axes
    check_layout(cuts)


def _seen_by(block: ResidualBlock, embeddings) -> dict[str, Any]:
    """What a block sees beside the residual stream."""
    return {"embeddings": embeddings} if block.sees_embeddings else {}


def embedding(
    vocabulary_size: int, hidden_dim: int, tie_word_embeddings: bool, dropout: float, dtype
) -> tuple[ReversibleEmbedding, keras.layers.Dropout]:
    """The first layers of a backbone, of arguments that are looked at here."""
    hidden_dim, dropout = SIZE("hidden_dim", hidden_dim), RATE("dropout", dropout)
    tie_word_embeddings = BOOLEAN("tie_word_embeddings", tie_word_embeddings)
    token_embedding = ReversibleEmbedding(
        input_dim=int(vocabulary_size),
        output_dim=hidden_dim,
        tie_weights=tie_word_embeddings,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
        dtype=dtype,
        name="token_embedding",
    )
    return token_embedding, keras.layers.Dropout(dropout, dtype=dtype, name="embeddings_dropout")


def checked_tokens(vocabulary_size: int, unpadded_vocabulary_size: int | None) -> int:
    """How many of the ids are tokens.

    Raises:
        ValueError: if there are none, or more than rows.
    """
    vocabulary_size = SIZE("vocabulary_size", vocabulary_size)
    num_tokens = optional(SIZE)("unpadded_vocabulary_size", unpadded_vocabulary_size)
    if num_tokens is None:
        return vocabulary_size
    if num_tokens > vocabulary_size:
        raise ValueError(
            "`unpadded_vocabulary_size` must lie between 1 and `vocabulary_size`. Received: "
            f"unpadded_vocabulary_size={num_tokens}, vocabulary_size={vocabulary_size}"
        )
    return num_tokens


def own_dtype(dtype):
    """`dtype`, or a copy of a map of policies: `quantize` writes in it, for one model alone.

    Raises:
        ValueError: unless a model can be made with `dtype`.
    """
    policy = keras.dtype_policies.get(OF_KERAS["dtype"]("dtype", dtype))
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        dtype = copy.deepcopy(policy)
        policy = policy.default_policy
    if policy.quantization_mode is not None:
        raise ValueError(
            "Weights are quantized once they are there: build or load the model in a floating "
            f"point dtype, then call `quantize({policy.quantization_mode!r})`. Received: {dtype}"
        )
    if "float" not in str(policy.compute_dtype):
        raise ValueError(
            f"`dtype` must be a floating point dtype or policy. Received: dtype={shown(dtype)}"
        )
    return dtype
