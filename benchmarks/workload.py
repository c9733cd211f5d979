"""What is measured: the model's shapes, the numbers of tokens, and the floors set by arithmetic."""

from dataclasses import dataclass
from dataclasses import replace
from typing import Any

# What numbers take; those of the recurrence and its state are float32 whatever the dtype.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "Q8_0": 34 / 32}
QUANTIZED = ("int8", "Q8_0")  # these have the matrices only
FLOAT32_BYTES = 4
LONG_PROMPT = 2048  # a longer one is measured once
LONG_CONTEXT = 16384


@dataclass(frozen=True)
class Workload:
    """Mamba-2 130M: one group, tied embeddings."""

    vocabulary_size: int = 50288
    num_layers: int = 24
    hidden_dim: int = 768
    state_dim: int = 128
    head_dim: int = 64
    conv_kernel_size: int = 4
    dtype: str = "float32"
    platform: str = "cpu"

    prompt_tokens: int = 128
    long_contexts: tuple[int, ...] = (1024, 4096, 16384, 65536)  # for ours alone
    long_batch_sizes: tuple[int, ...] = (1,)
    decode_tokens: int = 32
    prefill_tokens: tuple[int, ...] = (16, 64, 128, 256, 512, 2048, 8192, 32768)
    repeats: int = 3
    # A figure is left out if one repeat would take longer than the limit, and repeats end with the
    # budget: the slowest subjects take minutes for what others do in a second.
    limit_s: float = 60.0
    budget_s: float = 10.0
    chunk_size: int = 64  # what keras_mamba2 takes on the platform; for the count of operations

    bandwidth_bytes: int = 2**29
    matmul_size: int = 2048

    @property
    def num_heads(self) -> int:
        return 2 * self.hidden_dim // self.head_dim

    @property
    def model(self) -> dict[str, Any]:
        """The arguments of `Mamba2Backbone`."""
        names = ("vocabulary_size", "num_layers", "hidden_dim", "state_dim", "head_dim")
        sizes = {name: getattr(self, name) for name in (*names, "conv_kernel_size")}
        return sizes | {"dtype": self._small_dtype}

    def without_longest(self) -> "Workload":
        """For the rounds after the first."""
        return replace(
            self,
            prefill_tokens=tuple(t for t in self.prefill_tokens if t <= LONG_PROMPT),
            long_contexts=tuple(t for t in self.long_contexts if t <= LONG_CONTEXT),
        )

    def decode_bytes(self, batch_size: int) -> int:
        """What one step has to move: every weight is read, every state read and written."""
        return self.weight_bytes() + 2 * self.state_bytes(batch_size)

    def weight_bytes(self) -> int:
        d, e, n, h, k = self.letters()
        projections = d * (2 * e + 2 * n + h) + e * d
        vectors = (k + 1) * (e + 2 * n) + e + d
        matrices = self.num_layers * projections + self.vocabulary_size * d
        small = DTYPE_BYTES[self._small_dtype] * (self.num_layers * vectors + d)
        small += FLOAT32_BYTES * self.num_layers * 3 * h
        return round(DTYPE_BYTES[self.dtype] * matrices) + small

    def state_bytes(self, batch_size: int) -> int:
        _, e, n, _, k = self.letters()
        conv, ssm = DTYPE_BYTES[self._small_dtype] * (k - 1) * (e + 2 * n), FLOAT32_BYTES * e * n
        return batch_size * self.num_layers * (conv + ssm)

    def prefill_flops(self, tokens: int) -> int:
        """Operations of a prefill, two a multiply-add, the head at the last position only.

        For each token and layer, with SSD as in Listing 1 of the paper in chunks of q:

            in_proj    2 d (2e + 2n + h)      C B^T                     2 q n
            conv       2 k (e + 2n)           (C B^T * decay) x         2 q e
            out_proj   2 e d                  chunk states, C state     2 n e each
        """
        d, e, n, h, k = self.letters()
        q = min(self.chunk_size, tokens)
        layer = 2 * d * (2 * e + 2 * n + h) + 2 * k * (e + 2 * n) + 2 * e * d
        layer += 2 * q * n + 2 * q * e + 2 * (2 * n * e)
        return tokens * self.num_layers * layer + 2 * d * self.vocabulary_size

    def training_flops(self, tokens: int) -> int:
        """Of a training step: the head at every position, and two products backward for each."""
        head = 2 * self.hidden_dim * self.vocabulary_size
        return 3 * (self.prefill_flops(tokens) + (tokens - 1) * head)

    @property
    def _small_dtype(self) -> str:
        """The dtype of what is no matrix."""
        return "float32" if self.dtype in QUANTIZED else self.dtype

    def letters(self) -> tuple[int, int, int, int, int]:
        """d, e, n, h, k, as in `keras_mamba2/ops/ssd.py`."""
        d = self.hidden_dim
        return d, 2 * d, self.state_dim, self.num_heads, self.conv_kernel_size


FULL = Workload()
# Layers and hidden_dim of the published checkpoints, which share the rest.
SIZES = {
    "130m": (24, 768),
    "370m": (48, 1024),
    "780m": (48, 1536),
    "1.3b": (48, 2048),
    "2.7b": (64, 2560),
}
QUICK = Workload(
    vocabulary_size=256,
    num_layers=2,
    hidden_dim=64,
    state_dim=16,
    head_dim=16,
    prompt_tokens=8,
    long_contexts=(32, 64),
    decode_tokens=4,
    prefill_tokens=(16, 32),
    repeats=1,
    bandwidth_bytes=2**22,
    matmul_size=128,
)


def of_size(size: str, **changes: Any) -> Workload:
    """The full workload at the shapes of a published checkpoint, with other `changes`."""
    num_layers, hidden_dim = SIZES[size]
    return replace(FULL, num_layers=num_layers, hidden_dim=hidden_dim, **changes)
