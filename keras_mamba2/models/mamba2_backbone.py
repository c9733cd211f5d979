from collections.abc import Sequence

import keras
import keras_hub
from keras import ops

from keras_mamba2.conversion import open_preset
from keras_mamba2.layers.gated_rms_normalization import GatedRMSNormalization
from keras_mamba2.layers.mamba2_block import Mamba2Block
from keras_mamba2.layers.reversible_embedding import ReversibleEmbedding
from keras_mamba2.models import lora
from keras_mamba2.models import quantization
from keras_mamba2.models.mamba2_layout import check_layout
from keras_mamba2.models.mamba2_layout import layout_map
from keras_mamba2.models.mamba2_state import NO_TOKEN
from keras_mamba2.models.mamba2_state import Mamba2State


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2Backbone(keras_hub.models.Backbone):
    """The Mamba-2 language model without its head: token ids in, hidden states out.

    Args:
        vocabulary_size: int, v, the rows of the embedding.
        num_layers: int.
        hidden_dim: int, d.
        state_dim: int, n, the size of the state of each channel.
        head_dim: int, p, channels a head; divides expansion * hidden_dim.
        num_groups: int, g, groups of heads that share B and C; divides the number of heads.
        expansion: float, the inner size is expansion * hidden_dim.
        conv_kernel_size: int, k.
        chunk_size: int, positions computed at once. `None` takes the value that is fast on the
            platform. The result does not depend on it beyond rounding.
        use_bias: bool, whether the projections have a bias.
        use_conv_bias: bool, whether the convolutions have a bias.
        layer_norm_epsilon: float.
        time_step_limit: pair of floats, step sizes are clipped to it. `None` for no limit.
        time_step_min: float, the least step size at initialisation.
        time_step_max: float, the largest step size at initialisation.
        time_step_floor: float, initial step sizes are at least this.
        a_initializer_range: pair of floats, `-A` is drawn from it at initialisation.
        residual_in_fp32: bool, whether the residual stream is float32 whatever the dtype policy.
        tie_word_embeddings: bool, whether the head is the transposed embedding.
        unpadded_vocabulary_size: int, ids from here up to v are rows that only pad the embedding,
            and are never sampled. `None` for v.
        dropout: float, the rate at which embeddings and the outputs of mixers are dropped in
            training.
        remat: bool, whether the inside of blocks is computed again in the backward pass instead of
            being stored: less memory on a TPU, for about a third more operations.
        dtype: string or `keras.DTypePolicy`. The parameters of the recurrence, its state and
            the norms are float32 whatever the policy.
        **kwargs: `name` and `trainable`.

    Call arguments:
        token_ids: int tensor `(b t)`.
        padding_mask: int tensor `(b t)`, non-zero at real tokens, which are contiguous in each
            row; padding on either side leaves the outputs of real tokens as they were. Other
            numbers than 1 tell documents of a packed row apart (0 padding, 1, 2, ...): each gets
            what it gets alone.

    Example:
    ```python
    backbone = keras_mamba2.Mamba2Backbone(vocabulary_size=256, num_layers=2, hidden_dim=64)
    backbone({"token_ids": np.ones((1, 12)), "padding_mask": np.ones((1, 12))})  # (1 12 64)
    ```

    Reference:
        - [Dao and Gu, 2024](https://arxiv.org/abs/2405.21060)
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        hidden_dim: int,
        state_dim: int = 128,
        head_dim: int = 64,
        num_groups: int = 1,
        expansion: float = 2,
        conv_kernel_size: int = 4,
        chunk_size: int | None = None,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        layer_norm_epsilon: float = 1e-5,
        time_step_limit: tuple[float, float | None] | None = None,
        time_step_min: float = 0.001,
        time_step_max: float = 0.1,
        time_step_floor: float = 1e-4,
        a_initializer_range: tuple[float, float] = (1, 16),
        residual_in_fp32: bool = True,
        tie_word_embeddings: bool = True,
        unpadded_vocabulary_size: int | None = None,
        dropout: float = 0.0,
        remat: bool = False,
        dtype=None,
        **kwargs,
    ):
        _check_dtype(dtype)
        for name, value in (("vocabulary_size", vocabulary_size), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"`{name}` must be positive. Received: {name}={value}")
        if unpadded_vocabulary_size is None:
            unpadded_vocabulary_size = vocabulary_size
        if not 0 < unpadded_vocabulary_size <= vocabulary_size:
            raise ValueError(
                "`unpadded_vocabulary_size` must lie between 1 and `vocabulary_size`. Received: "
                f"unpadded_vocabulary_size={unpadded_vocabulary_size}, "
                f"vocabulary_size={vocabulary_size}"
            )

        inner_dim = round(expansion * hidden_dim)
        num_heads = inner_dim // head_dim
        in_proj_dim = 2 * inner_dim + 2 * num_groups * state_dim + num_heads
        check_layout(
            {
                "token_embedding/embeddings": {
                    "vocabulary_size": vocabulary_size,
                    "hidden_dim": hidden_dim,
                },
                "block_0/mixer/out_proj/kernel": {"num_heads": num_heads, "hidden_dim": hidden_dim},
                "block_0/mixer/in_proj/kernel": {
                    "hidden_dim": hidden_dim,
                    "2 * inner_dim + 2 * num_groups * state_dim + num_heads": in_proj_dim,
                },
            }
        )

        # === Layers ===
        self.token_embedding = ReversibleEmbedding(
            input_dim=vocabulary_size,
            output_dim=hidden_dim,
            tie_weights=tie_word_embeddings,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
            dtype=dtype,
            name="token_embedding",
        )
        self.embeddings_dropout = keras.layers.Dropout(
            dropout, dtype=dtype, name="embeddings_dropout"
        )
        self.blocks = [
            Mamba2Block(
                hidden_dim=hidden_dim,
                state_dim=state_dim,
                head_dim=head_dim,
                num_groups=num_groups,
                expansion=expansion,
                conv_kernel_size=conv_kernel_size,
                chunk_size=chunk_size,
                use_bias=use_bias,
                use_conv_bias=use_conv_bias,
                layer_norm_epsilon=layer_norm_epsilon,
                time_step_limit=time_step_limit,
                time_step_min=time_step_min,
                time_step_max=time_step_max,
                time_step_floor=time_step_floor,
                a_initializer_range=a_initializer_range,
                num_residual_layers=num_layers,
                residual_in_fp32=residual_in_fp32,
                dropout=dropout,
                remat=remat,
                dtype=dtype,
                name=f"block_{i}",
            )
            for i in range(num_layers)
        ]
        self.norm = GatedRMSNormalization(
            epsilon=layer_norm_epsilon, dtype=dtype, name="final_norm"
        )

        # === Functional Model ===
        token_id_input = keras.Input(shape=(None,), dtype="int32", name="token_ids")
        padding_mask_input = keras.Input(shape=(None,), dtype="int32", name="padding_mask")
        x = self.embeddings_dropout(self.token_embedding(token_id_input))
        for block in self.blocks:
            x = block(x, padding_mask=padding_mask_input)
        super().__init__(
            inputs={"token_ids": token_id_input, "padding_mask": padding_mask_input},
            outputs=self.norm(x),
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self.vocabulary_size = vocabulary_size
        self.num_layers = num_layers
        self.hidden_dim = hidden_dim
        self.state_dim = state_dim
        self.head_dim = head_dim
        self.num_groups = num_groups
        self.expansion = expansion
        self.conv_kernel_size = conv_kernel_size
        self.chunk_size = chunk_size
        self.use_bias = use_bias
        self.use_conv_bias = use_conv_bias
        self.layer_norm_epsilon = layer_norm_epsilon
        self.time_step_limit = self.blocks[0].mixer.time_step_limit
        self.time_step_min = time_step_min
        self.time_step_max = time_step_max
        self.time_step_floor = time_step_floor
        self.a_initializer_range = tuple(a_initializer_range)
        self.residual_in_fp32 = residual_in_fp32
        self.tie_word_embeddings = tie_word_embeddings
        self.unpadded_vocabulary_size = unpadded_vocabulary_size
        self.dropout = dropout
        self.remat = remat

    def call_with_state(self, token_ids, state: Mamba2State | None = None, padding_mask=None):
        """Runs the model on `(b t)` token ids after `state`.

        Differentiable in the state too. A `padding_mask` of integers numbers documents, as in a
        call; `state` then belongs to the first, and the returned one to the last.

        Returns:
            Tuple `(hidden_states, state)`: `(b t d)`, and the `Mamba2State` after each row's
            last real token.
        """
        b, t = ops.shape(token_ids)
        token = ops.full((b,), NO_TOKEN, "int32") if state is None else state.token
        length = ops.zeros((b,), "int32") if state is None else state.length
        layers = [None] * self.num_layers if state is None else state.layers
        x, states = self.embeddings_dropout(self.token_embedding(token_ids)), []
        for block, layer in zip(self.blocks, layers, strict=True):
            x, layer = block.call_with_state(x, layer, padding_mask)
            states.append(layer)
        seen = t if padding_mask is None else ops.count_nonzero(padding_mask, axis=1)
        return self.norm(x), Mamba2State(states, token, length + ops.cast(seen, "int32"))

    def step(self, token_ids, state: Mamba2State, mask=None):
        """Runs the model on one token a row, `(b)`, after `state`.

        Where the boolean `mask` `(b)` is false, the state stays as it was.

        Returns:
            Tuple `(hidden_states, state)`: `(b d)`, and the `Mamba2State` after the token.
        """
        x, states = self.token_embedding(token_ids), []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x, layer = block.step(x, layer, mask)
            states.append(layer)
        seen = 1 if mask is None else ops.cast(mask, "int32")
        return self.norm(x), Mamba2State(states, state.token, state.length + seen)

    def initial_state(self, batch_size: int) -> Mamba2State:
        """The state before the first token of `batch_size` rows."""
        return Mamba2State(
            [block.mixer.initial_state(batch_size) for block in self.blocks],
            token=ops.full((batch_size,), NO_TOKEN, "int32"),
            length=ops.zeros((batch_size,), "int32"),
        )

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs) -> "Mamba2Backbone":
        """Loads a backbone by name or folder. See `keras_hub.models.Backbone.from_preset`."""
        loader, preset = open_preset(preset, weights=load_weights, tokenizer=False)
        if loader is not None:
            return loader.load_backbone(cls, load_weights, **kwargs)
        return super().from_preset(preset, load_weights=load_weights, **kwargs)

    @staticmethod
    def get_layout_map(
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
            device_mesh,
            model_parallel_dim_name,
            data_parallel_dim_name,
            sequence_parallel_dim_name,
        )

    def default_lora_layer_names(self) -> list[str]:
        return ["in_proj", "out_proj"]

    def enable_lora(self, rank: int, target_layer_names: Sequence[str] | None = None) -> None:
        """Freezes the model, and adds LoRA adapters to its projections, to be trained instead.

        Compile the model afterwards. A bias of a projection is frozen too, so that the adapters
        hold all that training changes.

        Args:
            rank: int.
            target_layer_names: sequence of strings, `"in_proj"`, `"out_proj"`. `None` for both.

        Raises:
            ValueError: for another name, if LoRA is enabled already, and for weights quantized
                to anything but int8 and int4.
        """
        if rank < 1:
            raise ValueError(f"`rank` must be positive. Received: rank={rank}")
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
        """As `keras_hub.models.Backbone.save_lora_weights`: a file that ends in `.lora.h5`."""
        lora.check_uniform(self)
        super().save_lora_weights(filepath)

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
        quantization.check(self, config)
        filters = quantization.is_quantizable if filters is None else filters
        super().quantize(mode, config=config, filters=filters, **kwargs)
        quantization.remember_policies(self)

    def get_quantization_layer_structure(self, mode: str):
        return quantization.layer_structure(self, mode)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "vocabulary_size": self.vocabulary_size,
                "num_layers": self.num_layers,
                "hidden_dim": self.hidden_dim,
                "state_dim": self.state_dim,
                "head_dim": self.head_dim,
                "num_groups": self.num_groups,
                "expansion": self.expansion,
                "conv_kernel_size": self.conv_kernel_size,
                "chunk_size": self.chunk_size,
                "use_bias": self.use_bias,
                "use_conv_bias": self.use_conv_bias,
                "layer_norm_epsilon": self.layer_norm_epsilon,
                "time_step_limit": self.time_step_limit,
                "time_step_min": self.time_step_min,
                "time_step_max": self.time_step_max,
                "time_step_floor": self.time_step_floor,
                "a_initializer_range": self.a_initializer_range,
                "residual_in_fp32": self.residual_in_fp32,
                "tie_word_embeddings": self.tie_word_embeddings,
                "unpadded_vocabulary_size": self.unpadded_vocabulary_size,
                "dropout": self.dropout,
                "remat": self.remat,
            }
        )
        return config


def _check_dtype(dtype):
    policy = keras.dtype_policies.get(dtype)
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy.default_policy
    if policy.quantization_mode is not None:
        raise ValueError(
            "Weights are quantized once they are there: build or load the model in a floating "
            f"point dtype, then call `quantize({policy.quantization_mode!r})`. Received: {dtype}"
        )
    if "float" not in str(policy.compute_dtype):
        raise ValueError(f"`dtype` must be a floating point dtype or policy. Received: {dtype}")
