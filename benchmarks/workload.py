"""What is measured: the model's shapes, the number of tokens, and the floors set by arithmetic."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Mamba-2 130M, float32, one group, tied embeddings. Letters as in `keras_mamba2/ops/ssd.py`."""

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

    bandwidth_bytes: int = 2**29
    matmul_size: int = 2048

    @property
    def inner_dim(self) -> int:
        return 2 * self.hidden_dim

    @property
    def num_heads(self) -> int:
        return self.inner_dim // self.head_dim

    def weight_count(self) -> int:
        d, e, n, h, k = self._letters()
        in_proj, out_proj = d * (2 * e + 2 * n + h), e * d
        conv, vectors = (k + 1) * (e + 2 * n), 3 * h + e + d
        layer = in_proj + out_proj + conv + vectors
        return self.num_layers * layer + d + self.vocabulary_size * d

    def decode_bytes(self, batch_size: int) -> int:
        """What one step has to move: every weight is read, every state read and written."""
        _, e, n, _, k = self._letters()
        state = self.num_layers * (e * n + (k - 1) * (e + 2 * n))
        return 4 * (self.weight_count() + 2 * batch_size * state)

    def prefill_flops(self, tokens: int, chunk_size: int) -> float:
        """Operations of a prefill, two a multiply-add, the head at the last position only.

        For each token and layer, in SSD as in Listing 1 of the paper with chunks of q:

            in_proj    2 d (2e + 2n + h)        C B^T              2 q n
            conv       2 k (e + 2n)             times x            2 q e
            out_proj   2 e d                    chunk states, and their output   2 * 2 n e
        """
        d, e, n, h, k = self._letters()
        q = min(chunk_size, tokens)
        projections = 2 * d * (2 * e + 2 * n + h) + 2 * e * d + 2 * k * (e + 2 * n)
        layer = projections + 2 * q * n + 2 * q * e + 4 * n * e
        return tokens * self.num_layers * layer + 2 * d * self.vocabulary_size

    def _letters(self) -> tuple[int, int, int, int, int]:
        return (
            self.hidden_dim,
            self.inner_dim,
            self.state_dim,
            self.num_heads,
            self.conv_kernel_size,
        )


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
