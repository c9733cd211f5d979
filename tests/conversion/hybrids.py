"""Small hybrids of transformers with random weights, of every family and every switch of it."""

import copy
from unittest import mock

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.1,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
GRANITE = {
    **SIZES,
    **MAMBA,
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_n_groups": 1,
    "shared_intermediate_size": 24,
    "intermediate_size": 20,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 3.0,
    "rms_norm_eps": 1e-5,
    "position_embedding_type": "nope",
    "tie_word_embeddings": True,
}
EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 3}
NEMOTRON = {
    **SIZES,
    "head_dim": 16,
    "intermediate_size": 48,
    "mlp_hidden_act": "relu2",
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 8,
    "time_step_limit": (0.0, float("inf")),
}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 24,
    "routed_scaling_factor": 2.5,
}
FALCON = {
    **SIZES,
    **MAMBA,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "mamba_d_ssm": 48,
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    "rope_theta": 1e11,
    "lm_head_multiplier": 0.3,
    "embedding_multiplier": 5.6,
    "mlp_multipliers": [0.9, 0.35],
    "key_multiplier": 0.4,
    "attention_out_multiplier": 0.9,
    "attention_in_multiplier": 1.1,
    "ssm_multipliers": [0.35, 0.25, 0.17, 0.5, 0.32],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.23,
}
BAMBA = {
    **SIZES,
    **MAMBA,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "attn_layer_indices": [1],
    "mamba_n_groups": 2,
    "mamba_expand": 2,
}
ZAMBA = {
    **SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 4,
    "num_hidden_layers": 7,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid", "mamba", "hybrid"],
    "mamba_d_state": 16,
    "n_mamba_heads": 8,
    "chunk_size": 8,
    "hidden_act": "gelu",
    "adapter_rank": 4,
}
# The family, and its configuration. Between them every option that changes the computation.
CASES = {
    "granite": ("GraniteMoeHybrid", GRANITE | {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "granite, experts": ("GraniteMoeHybrid", GRANITE | EXPERTS),
    "granite, rotary": (
        "GraniteMoeHybrid",
        {
            **GRANITE,
            **EXPERTS,
            "position_embedding_type": "rope",
            "mamba_n_groups": 2,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "time_step_limit": (0.05, 0.3),
            "tie_word_embeddings": False,
        },
    ),
    "nemotron": (
        "NemotronH",
        {**NEMOTRON, "hybrid_override_pattern": "M-*-", "mlp_bias": True, "use_bias": True},
    ),
    "nemotron, experts": ("NemotronH", {**NEMOTRON, **ROUTED, "hybrid_override_pattern": "ME*E"}),
    "nemotron, groups of experts": (
        "NemotronH",
        {
            **NEMOTRON,
            **ROUTED,
            "hybrid_override_pattern": "ME*-",
            "n_group": 4,
            "topk_group": 2,
            "moe_latent_size": 12,
        },
    ),
    "falcon": ("FalconH1", {**FALCON, "mamba_rms_norm": False}),
    "falcon, norm after gate": (
        "FalconH1",
        {**FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "attention_bias": True},
    ),
    "falcon, norm before gate": (
        "FalconH1",
        {**FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": True, "projectors_bias": True},
    ),
    "bamba": ("Bamba", BAMBA),
    "bamba, tied": (
        "Bamba",
        {**BAMBA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "zamba, one block": (
        "Zamba2",
        {**ZAMBA, "use_shared_attention_adapter": True, "use_mem_rope": True},
    ),
    "zamba, two blocks": (
        "Zamba2",
        {**ZAMBA, "num_mem_blocks": 2, "mamba_ngroups": 2, "add_bias_linear": True},
    ),
}
MAMBA_ALONE, ATTENTION_ALONE = ["mamba"] * 3, ["attention"] * 3
DENSE = {**GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0}
# What lacks a kind of layer, or other parts.
ALONE = {
    "granite, no attention": ("GraniteMoeHybrid", {**DENSE, "layer_types": MAMBA_ALONE}),
    "granite, no mixer": ("GraniteMoeHybrid", {**DENSE, "layer_types": ATTENTION_ALONE}),
    "nemotron, no attention": ("NemotronH", {**NEMOTRON, "hybrid_override_pattern": "M-M-"}),
    "nemotron, no bias": ("NemotronH", {**NEMOTRON, "hybrid_override_pattern": "M-*-"}),
    "nemotron, no mixer": ("NemotronH", {**NEMOTRON, "hybrid_override_pattern": "*-*"}),
    "nemotron, no mlp": ("NemotronH", {**NEMOTRON, "hybrid_override_pattern": "MM*"}),
    "bamba, no attention": ("Bamba", {**BAMBA, "attn_layer_indices": None}),
    "bamba, no mixer": ("Bamba", {**BAMBA, "attn_layer_indices": [0, 1, 2]}),
    "zamba, no attention": ("Zamba2", {**ZAMBA, "layers_block_type": ["mamba"] * 7}),
}
# One of each family, where more would show nothing new.
FAMILIES = ("granite, experts", "nemotron, experts", "falcon", "bamba", "zamba, two blocks")


def random_model(name: str, seed: int = 0):
    """The model of a case in float32, with weights of a trained model's size."""
    family, arguments = (CASES | ALONE)[name]
    config = getattr(transformers, f"{family}Config")(**arguments)
    # The default way to compute experts knows no float64.
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            weight.copy_(_random(path, weight.shape, generator))
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def _random(path, shape, generator):
    numbers = torch.randn(shape, generator=generator)
    if path.endswith("A_log"):
        return numbers.abs().clamp(0.05, 2.5)
    if path.endswith("dt_bias"):
        return numbers - 2
    if path.endswith(".D") or "norm" in path:
        return 1 + 0.3 * numbers
    if len(shape) < 2:
        return 0.2 * numbers
    return numbers * (0.7 * shape[-1] ** -0.5 if shape[-1] > 4 else 0.4)


def logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids), use_cache=False).logits.numpy()


def logits_in_float64(model, ids: np.ndarray) -> np.ndarray:
    """In float64 throughout: also where the code of transformers says float32."""
    model = copy.deepcopy(model).double()
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        found = logits(model, ids)
    assert found.dtype == np.float64
    return found
