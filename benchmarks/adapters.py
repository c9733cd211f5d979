"""The peers behind one interface: `prefill` reads a prompt, `decode` goes on greedily from there.

Frameworks are imported by name, so that a process holds only the one that it measures. Both
methods return when the work is done. All make one token of the last position's logits.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from typing import Protocol

import numpy as np

from benchmarks.checkpoint import GGUF_TYPES
from benchmarks.checkpoint import hugging_face_names
from benchmarks.workload import Workload


class Adapter(Protocol):
    """A model, made where it runs, with random weights or those in a folder of `checkpoint.py`.

    `prefill` takes int32 ids `(b t)`.
    """

    packages: tuple[str, ...]

    def __init__(self, workload: Workload, folder: Path | None): ...

    def prefill(self, token_ids: np.ndarray) -> None: ...

    def decode(self, num_tokens: int) -> None: ...

    def device_peak_bytes(self) -> int | None:
        """The most memory held on the device; None where that is the process's own."""


class KerasMamba2:
    """`keras_mamba2` on JAX: the programs of `Mamba2CausalLM.generate`, prefill and one loop."""

    packages = ("jax", "keras", "keras_mamba2")

    def __init__(self, workload: Workload, folder: Path | None):
        self.jax, _, keras_mamba2 = map(import_module, self.packages)
        if folder is None:
            backbone = keras_mamba2.Mamba2Backbone(**workload.model)
        else:
            dtype = workload.model["dtype"]
            backbone = keras_mamba2.Mamba2Backbone.from_preset(str(folder), dtype=dtype)
        self.lm = keras_mamba2.Mamba2CausalLM(backbone)
        if workload.dtype == "int8":
            self.lm.quantize("int8")
        self.lm.compile(sampler="greedy")
        self.generator = self.lm.make_generate_function()

    def prefill(self, token_ids: np.ndarray) -> None:
        limits = np.full(len(token_ids), 2**30)
        self.rows = self.generator.start(list(token_ids), limits)
        self.decode(1)

    def decode(self, num_tokens: int) -> None:
        self.rows, *_ = self.generator.advance(self.rows, num_tokens)
        self.jax.block_until_ready(self.rows.remaining)

    def decode_by_step(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self.rows, *_ = self.generator.advance(self.rows, 1)
        self.jax.block_until_ready(self.rows.remaining)

    def generate_one(self, token_ids: np.ndarray) -> None:
        inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
        self.lm.generate(inputs, max_new_tokens=1, stop_token_ids=None)

    def programs_of_one(self, token_ids: np.ndarray) -> Callable[[], None]:
        return import_module("benchmarks.programs").programs_of_one(self.lm, token_ids)

    def decode_program_text(self) -> str:
        programs = import_module("benchmarks.programs")
        traced = programs.decode_program(self.lm, 1, self.jax.ShapeDtypeStruct)
        return traced.lower().compile().as_text()

    def device_peak_bytes(self) -> int | None:
        return jax_device_peak_bytes(self.jax)


class Torch:
    """What the models on torch share: the device, one forward call a token."""

    def __init__(self, workload: Workload, folder: Path | None):
        self.torch, *_ = map(import_module, self.packages)
        self.device = {"cpu": "cpu", "gpu": "cuda"}[workload.platform]
        self.torch.set_default_dtype(getattr(self.torch, workload.dtype))
        with self.torch.device(self.device):
            self.model = self.create_model(workload, folder).eval()

    def prefill(self, token_ids: np.ndarray) -> None:
        with self.torch.inference_mode():
            token_ids = self.torch.from_numpy(token_ids).long().to(self.device)
            self.token = self.first_token(token_ids)  # (b 1)
        self._wait()

    def decode(self, num_tokens: int) -> None:
        with self.torch.inference_mode():
            for _ in range(num_tokens):
                self.token = self.next_token(self.token)
        self._wait()

    def device_peak_bytes(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


class Transformers(Torch):
    """Hugging Face transformers on torch: one forward call a token, as its `generate` does."""

    packages = ("torch", "transformers")

    def create_model(self, workload: Workload, folder: Path | None):
        transformers = import_module("transformers")
        if folder is not None:
            return transformers.Mamba2ForCausalLM.from_pretrained(folder)
        config = transformers.Mamba2Config(
            num_heads=workload.num_heads,
            n_groups=1,
            tie_word_embeddings=True,
            **hugging_face_names(workload),
        )
        return transformers.Mamba2ForCausalLM(config)

    def first_token(self, token_ids):
        self.cache = None
        return self.next_token(token_ids)

    def next_token(self, token_ids):
        output = self.model(token_ids, cache_params=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.cache_params
        return output.logits[:, -1].argmax(-1, keepdim=True)


class MambaSSM(Torch):
    """mamba_ssm, the authors' Triton kernels, decoding as its `generate(cg=True)`: a CUDA graph."""

    packages = ("torch", "mamba_ssm")
    max_tokens = 2**20  # it sizes nothing in a model without attention
    graphs = None  # its state has as many rows as the first prompts that it was made for

    def create_model(self, workload: Workload, folder: Path | None):
        config = import_module("mamba_ssm.models.config_mamba").MambaConfig(
            d_model=workload.hidden_dim,
            n_layer=workload.num_layers,
            vocab_size=workload.vocabulary_size,
            ssm_cfg={
                "layer": "Mamba2",
                "d_state": workload.state_dim,
                "headdim": workload.head_dim,
                "d_conv": workload.conv_kernel_size,
            },
        )
        dtype = getattr(self.torch, workload.dtype)
        models = import_module("mamba_ssm.models.mixer_seq_simple")
        return models.MambaLMHeadModel(config, device=self.device, dtype=dtype)

    def first_token(self, token_ids):
        b, t = token_ids.shape
        if self.graphs is not None and self.graphs.max_batch_size != b:
            self.graphs = None
        generation = import_module("mamba_ssm.utils.generation")
        self.graphs = generation.update_graph_cache(self.model, self.graphs, b, t, self.max_tokens)
        state = self.graphs.inference_params
        state.reset(self.max_tokens, b)
        output = self.model(token_ids, inference_params=state, num_last_tokens=1)
        state.seqlen_offset = t
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def next_token(self, token):
        state = self.graphs.inference_params
        positions = self.torch.full_like(token, state.seqlen_offset)
        logits = self.graphs.run(token, positions, state.seqlen_offset)
        state.seqlen_offset += 1
        return logits[:, -1].argmax(-1, keepdim=True)


class Mamba2Jax:
    """mamba2-jax: its cached call, jitted, in a Python loop, as its README does.

    It reads PyTorch's files only, so its weights are other random ones.
    """

    packages = ("jax", "mamba2_jax")

    def __init__(self, workload: Workload, folder: Path | None):
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

    def device_peak_bytes(self) -> int | None:
        return jax_device_peak_bytes(self.jax)

    def _forward(self, token_ids, cache) -> None:
        self.token, self.cache = self.forward(self.model, token_ids, cache)  # token (b 1)


class LlamaCpp:
    """llama.cpp: its C library's calls on a GGUF file, one call a token."""

    packages = ("llama_cpp", "gguf")

    def __init__(self, workload: Workload, folder: Path | None):
        if folder is None:
            raise ValueError("llama.cpp needs a folder of `benchmarks/checkpoint.py`.")
        llama_cpp_model = import_module("benchmarks.llama_cpp_model")
        self.model = llama_cpp_model.LlamaCpp(folder / f"{workload.dtype}.gguf")

    def prefill(self, token_ids: np.ndarray) -> None:
        self.model.start(len(token_ids))
        self.token = self.model.advance(token_ids).argmax(-1)[:, None]  # (b 1)

    def decode(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self.token = self.model.advance(self.token).argmax(-1)[:, None]

    def device_peak_bytes(self) -> int | None:
        return None


def jax_device_peak_bytes(jax) -> int | None:
    statistics = jax.local_devices()[0].memory_stats()  # None on a CPU
    return statistics and statistics["peak_bytes_in_use"]


class Subject(NamedTuple):
    """What is measured under a name."""

    adapter: type[Adapter]
    dtype: str | None = None  # of the weights; None for that of the workload


ADAPTERS = {
    "keras_mamba2": Subject(KerasMamba2),
    "keras_mamba2, bfloat16": Subject(KerasMamba2, "bfloat16"),
    "keras_mamba2, int8": Subject(KerasMamba2, "int8"),
    "transformers": Subject(Transformers),
    "mamba2-jax": Subject(Mamba2Jax),
    "mamba_ssm": Subject(MambaSSM),
    **{f"llama.cpp, {dtype}": Subject(LlamaCpp, dtype) for dtype in GGUF_TYPES},
}
