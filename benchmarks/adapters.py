"""The peers behind one interface: `prefill` reads a prompt, `decode` goes on greedily from there.

Frameworks are imported by name, so that a process holds only the one that it measures. Both
methods return when the work is done. All make one token of the last position's logits.
"""

from importlib import import_module
from typing import Any
from typing import Protocol

import numpy as np

from benchmarks.workload import Workload


class Adapter(Protocol):
    """A model with random weights. `prefill` takes int32 token ids `(b t)`."""

    packages: tuple[str, ...]

    def prefill(self, token_ids: np.ndarray) -> None: ...

    def decode(self, num_tokens: int) -> None: ...


class KerasMamba2:
    """`keras_mamba2` on JAX: the programs of `Mamba2CausalLM.generate`, prefill and one loop."""

    packages = ("jax", "keras", "keras_mamba2")

    def __init__(self, workload: Workload):
        self.jax, _, keras_mamba2 = map(import_module, self.packages)
        lm = keras_mamba2.Mamba2CausalLM(keras_mamba2.Mamba2Backbone(**workload.model))
        lm.compile(sampler="greedy")
        self.generator = lm.make_generate_function()

    def prefill(self, token_ids: np.ndarray) -> None:
        room = np.full(len(token_ids), 2**30)
        self.rows = self.generator.start(list(token_ids), room)
        self.decode(1)

    def decode(self, num_tokens: int) -> None:
        self.rows, _ = self.generator.advance(self.rows, num_tokens)
        self.jax.block_until_ready(self.rows.remaining)


class Transformers:
    """Hugging Face transformers on torch: one forward call a token, as its `generate` does."""

    packages = ("torch", "transformers")

    def __init__(self, workload: Workload):
        self.torch, transformers = map(import_module, self.packages)
        config = transformers.Mamba2Config(
            num_heads=workload.num_heads,
            n_groups=1,
            tie_word_embeddings=True,
            **hugging_face_names(workload),
        )
        self.model = transformers.Mamba2ForCausalLM(config).eval()

    def prefill(self, token_ids: np.ndarray) -> None:
        self._forward(self.torch.from_numpy(token_ids).long(), None)

    def decode(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._forward(self.token, self.cache)

    def _forward(self, token_ids, cache) -> None:
        with self.torch.inference_mode():
            output = self.model(token_ids, cache_params=cache, use_cache=True, logits_to_keep=1)
            self.token = output.logits[:, -1].argmax(-1, keepdim=True)  # (b 1)
        self.cache = output.cache_params


class Mamba2Jax:
    """mamba2-jax: its cached call, jitted, in a Python loop, as its README does."""

    packages = ("jax", "mamba2_jax")

    def __init__(self, workload: Workload):
        self.jax, mamba2_jax = map(import_module, self.packages)
        config = mamba2_jax.Mamba2Config(**hugging_face_names(workload))
        self.model = mamba2_jax.create_random_model(config)

        @self.jax.jit
        def forward(model, token_ids, cache):
            output = model(token_ids, cache=cache)
            return self.jax.numpy.argmax(output["logits"][:, -1:], axis=-1), output["cache"]

        self.forward = forward

    def prefill(self, token_ids: np.ndarray) -> None:
        self._forward(token_ids, None)
        self.jax.block_until_ready(self.cache)

    def decode(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._forward(self.token, self.cache)
        self.jax.block_until_ready(self.cache)

    def _forward(self, token_ids, cache) -> None:
        self.token, self.cache = self.forward(self.model, token_ids, cache)  # token (b 1)


def hugging_face_names(workload: Workload) -> dict[str, Any]:
    return {
        "vocab_size": workload.vocabulary_size,
        "num_hidden_layers": workload.num_layers,
        "hidden_size": workload.hidden_dim,
        "state_size": workload.state_dim,
        "head_dim": workload.head_dim,
        "conv_kernel": workload.conv_kernel_size,
    }


ADAPTERS = {"keras_mamba2": KerasMamba2, "transformers": Transformers, "mamba2-jax": Mamba2Jax}
