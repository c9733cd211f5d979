"""What is measured: the model's shapes, the numbers of tokens, and the floors set by arithmetic."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Mamba-2 130M: float32, one group, tied embeddings."""

    vocabulary_size: int = 50288
    num_layers: int = 24
    hidden_dim: int = 768
    state_dim: int = 128
    head_dim: int = 64
    conv_kernel_size: int = 4

    prompt_tokens: int = 128
    long_prompt_tokens: int = 16384
    decode_tokens: int = 32
    prefill_tokens: tuple[int, ...] = (512, 2048)
    repeats: int = 3
    chunk_size: int = 64  # what keras_mamba2 takes on a CPU; for the count of operations

    bandwidth_bytes: int = 2**29
    matmul_size: int = 2048

    @property
    def num_heads(self) -> int:
        return 2 * self.hidden_dim // self.head_dim

    def decode_bytes(self, batch_size: int) -> int:
        """What one step has to move: every weight is read, every state read and written."""
        d, e, n, h, k = self._letters()
        projections, vectors = (
            d * (2 * e + 2 * n + h) + e * d,
            (k + 1) * (e + 2 * n) + 3 * h + e + d,
        )
        weights = self.num_layers * (projections + vectors) + d + self.vocabulary_size * d
        state = self.num_layers * (e * n + (k - 1) * (e + 2 * n))
        return 4 * (weights + 2 * batch_size * state)

    def prefill_flops(self, tokens: int) -> int:
        """Operations of a prefill, two a multiply-add, the head at the last position only.

        For each token and layer, with SSD as in Listing 1 of the paper in chunks of q:

            in_proj    2 d (2e + 2n + h)      C B^T                     2 q n
            conv       2 k (e + 2n)           (C B^T * decay) x         2 q e
            out_proj   2 e d                  chunk states, C state     2 n e each
        """
        d, e, n, h, k = self._letters()
        q = min(self.chunk_size, tokens)
        layer = 2 * d * (2 * e + 2 * n + h) + 2 * k * (e + 2 * n) + 2 * e * d
        layer += 2 * q * n + 2 * q * e + 2 * (2 * n * e)
        return tokens * self.num_layers * layer + 2 * d * self.vocabulary_size

    def _letters(self) -> tuple[int, int, int, int, int]:
        """d, e, n, h, k, as in `keras_mamba2/ops/ssd.py`."""
        d = self.hidden_dim
        return d, 2 * d, self.state_dim, self.num_heads, self.conv_kernel_size


FULL = Workload()
QUICK = Workload(
    vocabulary_size=256,
    num_layers=2,
    hidden_dim=64,
    state_dim=16,
    head_dim=16,
    prompt_tokens=8,
    long_prompt_tokens=64,
    decode_tokens=4,
    prefill_tokens=(16, 32),
    repeats=1,
    bandwidth_bytes=2**22,
    matmul_size=128,
)
