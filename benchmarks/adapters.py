"""The peers behind one interface: `prefill` reads a prompt, `decode` goes on greedily from there.

Each adapter imports its framework when it is made, so that a process holds only the one it measures.
Both methods return when the work is done. All compute the head for the last position only.
"""

from importlib import import_module
from typing import Protocol

import numpy as np

from benchmarks.workload import Workload


class Adapter(Protocol):
    """A model with random weights. `prefill` takes int32 token ids `(b t)`."""

    def __init__(self, workload: Workload): ...

    def prefill(self, token_ids: np.ndarray) -> None: ...

    def decode(self, num_tokens: int) -> None: ...


class Ours:
    """`keras_mamba2` on JAX: prefill in blocks, then one compiled loop."""

    BLOCK = 512

    def __init__(self, workload: Workload):
        self.jax = jax = import_module("jax")
        keras = import_module("keras")
        self.backbone = backbone = import_module("keras_mamba2").Mamba2Backbone(
            vocabulary_size=workload.vocabulary_size,
            num_layers=workload.num_layers,
            hidden_dim=workload.hidden_dim,
            state_dim=workload.state_dim,
            head_dim=workload.head_dim,
            conv_kernel_size=workload.conv_kernel_size,
            dtype="float32",
        )
        self.weights = [variable.value for variable in backbone.variables]

        def next_token(hidden_states):  # (b d) -> (b)
            logits = backbone.token_embedding(hidden_states, reverse=True)
            return jax.numpy.argmax(logits, axis=-1).astype("int32")

        def run_block(token_ids, state):
            hidden_states, state = backbone.call_with_state(token_ids, state)
            return next_token(hidden_states[:, -1]), state

        def run_loop(num_tokens, token, state):
            def body(_, carry):
                hidden_states, state = backbone.step(*carry)
                return next_token(hidden_states), state

            return jax.lax.fori_loop(0, num_tokens, body, (token, state))

        def compiled(function):
            def with_weights(weights, *arguments):
                with keras.StatelessScope(zip(backbone.variables, weights, strict=True)):
                    return function(*arguments)

            return jax.jit(with_weights)

        self.run_block, self.run_loop = compiled(run_block), compiled(run_loop)

    def prefill(self, token_ids: np.ndarray) -> None:
        state = self.backbone.initial_state(token_ids.shape[0])
        for start in range(0, token_ids.shape[1], self.BLOCK):
            block = token_ids[:, start : start + self.BLOCK]
            self.token, state = self.run_block(self.weights, block, state)
        self.state = self.jax.block_until_ready(state)

    def decode(self, num_tokens: int) -> None:
        carry = self.run_loop(self.weights, num_tokens, self.token, self.state)
        self.token, self.state = self.jax.block_until_ready(carry)


class Transformers:
    """Hugging Face transformers on torch: one forward call a token, as its `generate` does."""

    def __init__(self, workload: Workload):
        self.torch = torch = import_module("torch")
        transformers = import_module("transformers")
        torch.manual_seed(0)
        config = transformers.Mamba2Config(
            vocab_size=workload.vocabulary_size,
            num_hidden_layers=workload.num_layers,
            hidden_size=workload.hidden_dim,
            state_size=workload.state_dim,
            head_dim=workload.head_dim,
            num_heads=workload.num_heads,
            n_groups=1,
            conv_kernel=workload.conv_kernel_size,
            tie_word_embeddings=True,
        )
        self.model = transformers.Mamba2ForCausalLM(config).eval()

    def prefill(self, token_ids: np.ndarray) -> None:
        self.cache = None
        self._forward(self.torch.from_numpy(token_ids).long())

    def decode(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._forward(self.token)

    def _forward(self, token_ids) -> None:
        with self.torch.inference_mode():
            output = self.model(
                token_ids, cache_params=self.cache, use_cache=True, logits_to_keep=1
            )
            self.token = output.logits[:, -1].argmax(-1, keepdim=True)  # (b 1)
        self.cache = output.cache_params


class Mamba2Jax:
    """mamba2-jax: its cached call, jitted, in a Python loop, as its README does."""

    def __init__(self, workload: Workload):
        self.jax = jax = import_module("jax")
        mamba2_jax = import_module("mamba2_jax")
        config = mamba2_jax.Mamba2Config(
            vocab_size=workload.vocabulary_size,
            num_hidden_layers=workload.num_layers,
            hidden_size=workload.hidden_dim,
            state_size=workload.state_dim,
            head_dim=workload.head_dim,
            conv_kernel=workload.conv_kernel_size,
        )
        self.model = mamba2_jax.create_random_model(config)

        @jax.jit
        def forward(model, token_ids, cache):
            output = model(token_ids, cache=cache)
            return jax.numpy.argmax(output["logits"][:, -1:], axis=-1), output["cache"]

        self.forward = forward

    def prefill(self, token_ids: np.ndarray) -> None:
        self._forward(token_ids, None)

    def decode(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._forward(self.token, self.cache)
        self.jax.block_until_ready(self.cache)

    def _forward(self, token_ids, cache) -> None:
        self.token, self.cache = self.forward(self.model, token_ids, cache)  # token (b 1)


ADAPTERS: dict[str, type[Adapter]] = {
    "keras_mamba2": Ours,
    "transformers": Transformers,
    "mamba2-jax": Mamba2Jax,
}
