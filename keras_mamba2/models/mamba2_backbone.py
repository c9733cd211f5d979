import keras

from keras_mamba2.arguments import SIZE
from keras_mamba2.layers.gated_rms_normalization import GatedRMSNormalization
from keras_mamba2.layers.mamba2_block import Mamba2Block
from keras_mamba2.layers.mamba2_mixer import Mamba2Mixer
from keras_mamba2.models.kept_dtypes import set_kept_dtypes
from keras_mamba2.models.residual_backbone import ResidualBackbone
from keras_mamba2.models.residual_backbone import checked_tokens
from keras_mamba2.models.residual_backbone import embedding
from keras_mamba2.models.residual_backbone import own_dtype

# What tells one architecture from another.
ARCHITECTURE = ("num_layers", "hidden_dim", "state_dim", "head_dim", "num_groups", "expansion")
ARCHITECTURE += ("conv_kernel_size", "vocabulary_size")


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2Backbone(ResidualBackbone):
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
            and are never sampled, unless a model's tokenizer has tokens for them. `None` for v.
        dropout: float, the rate at which embeddings and the outputs of mixers are dropped in
            training.
        remat: bool, whether the inside of blocks is computed again in the backward pass instead of
            being stored: less memory on a TPU, for about a third more operations.
        state_dtype: `"bfloat16"`, in which states keep what mixers remember, in half the bytes,
            rounded stochastically. `None` for float32.
        dtype: string or `keras.DTypePolicy`. The parameters of the recurrence, its state and
            the norms are float32 whatever the policy.
        **kwargs: `name` and `trainable`.

    Call arguments:
        token_ids: int tensor `(b t)`.
        padding_mask: int tensor `(b t)`, non-zero at real tokens, which are contiguous in each
            row; padding on either side leaves the outputs of real tokens as they were.
        segment_ids: optional int tensor `(b t)`, numbers of the documents of packed rows: each
            gets what it gets alone.

    Example:
    ```python
    backbone = keras_mamba2.Mamba2Backbone(vocabulary_size=256, num_layers=2, hidden_dim=64)
    backbone({"token_ids": np.ones((1, 12)), "padding_mask": np.ones((1, 12))})  # (1 12 64)
    ```

    Reference:
        - [Dao and Gu, 2024](https://arxiv.org/abs/2405.21060)
    """

    sublayers = (Mamba2Mixer,)

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
        state_dtype: str | None = None,
        dtype=None,
        **kwargs,
    ):
        dtype = own_dtype(dtype)
        num_layers = SIZE("num_layers", num_layers)
        unpadded_vocabulary_size = checked_tokens(vocabulary_size, unpadded_vocabulary_size)

        # === Layers ===
        token_embedding, embeddings_dropout = embedding(
            vocabulary_size, hidden_dim, tie_word_embeddings, dropout, dtype
        )
        blocks = [
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
        norm = GatedRMSNormalization(epsilon=layer_norm_epsilon, dtype=dtype, name="final_norm")
        super().__init__(token_embedding, embeddings_dropout, blocks, norm, dtype=dtype, **kwargs)

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
        set_kept_dtypes(self, state_dtype=state_dtype)

    @property
    def architecture(self) -> str:
        """The sizes in words, so that an error can name them."""
        values = ", ".join(f"{name}={getattr(self, name)}" for name in ARCHITECTURE)
        return f"{type(self).__name__}({values}, dtype={self.compute_dtype})"

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
                "state_dtype": self.state_dtype,
            }
        )
        return config
