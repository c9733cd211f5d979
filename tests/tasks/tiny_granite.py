"""A Granite 4.0 H of transformers with random weights, and a tokenizer that can chat."""

import json
import pathlib

import tokenizers
import torch
import transformers

from tests.chat import templates
from tests.conversion import family_tokenizers

GENERATION = {"eos_token_id": [0, 1]}


def save(folder, template=templates.GRANITE, generation=GENERATION) -> pathlib.Path:
    """Writes a checkpoint: a mixer, attention, experts. The names of its roles end a reply too."""
    trained = family_tokenizers.trained("granite")
    family_tokenizers.save("granite", folder, chat_template=template)
    torch.manual_seed(0)
    config = transformers.GraniteMoeHybridConfig(
        vocab_size=tokenizers.Tokenizer.from_str(trained).get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        layer_types=["mamba", "attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=16,
        shared_intermediate_size=16,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_expand=2,
        position_embedding_type="nope",
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=3,
    )
    transformers.GraniteMoeHybridForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
