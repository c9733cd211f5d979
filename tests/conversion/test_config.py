"""Configurations of both formats, and of models that are not ours."""

import json
import math
import pathlib
import re

import pytest

import keras_mamba2
from keras_mamba2 import conversion
from keras_mamba2.conversion import config_values
from keras_mamba2.conversion import constructor_arguments
from keras_mamba2.conversion import describe
from keras_mamba2.conversion import format_of
from keras_mamba2.conversion import read_constructor_arguments
from keras_mamba2.conversion import transformers_config
from keras_mamba2.conversion.architectures.values import vocabulary
from keras_mamba2.conversion.architectures.values import written_vocabulary
from keras_mamba2.conversion.config import check_unquantized

# state-spaces/mamba2-130m
ORIGINAL = {
    "d_model": 768,
    "d_intermediate": 0,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
TRANSFORMERS = {
    "model_type": "mamba2",
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "vocab_size": 50288,
    "num_heads": 24,
    "n_groups": 1,
    "tie_word_embeddings": True,
}
NEMOTRON = {"model_type": "nemotron_h", "hidden_size": 32, "num_attention_heads": 4}
GRANITE = {
    "model_type": "granitemoehybrid",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 8,
    "shared_intermediate_size": 40,
}
ZAMBA = {
    "model_type": "zamba2",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "layers_block_type": ["mamba", "hybrid"],
    "n_mamba_heads": 8,
}
BAMBA = {
    "model_type": "bamba",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attn_layer_indices": [1],
    "intermediate_size": 48,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
}


def test_both_formats_say_the_same():
    original = constructor_arguments(ORIGINAL)
    assert original.pop("a_initializer_range") == (1, 16)
    assert original.pop("unpadded_vocabulary_size") == 50277
    transformers = constructor_arguments(TRANSFORMERS)
    assert transformers.pop("unpadded_vocabulary_size") == 50288
    assert original == transformers
    assert original["vocabulary_size"] == 50288
    assert original["expansion"] == 2
    assert (format_of(ORIGINAL), format_of(TRANSFORMERS)) == ("state-spaces", "transformers")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.0, Infinity]", (0.0, None)),
        ('[0.0, {"__float__": "Infinity"}]', (0.0, None)),
        ('[0.001, "inf"]', (0.001, None)),
        ("[0.001, 0.1]", (0.001, 0.1)),
        ("null", (0.0, None)),
    ],
)
def test_every_spelling_of_the_time_step_limit(text, expected):
    config = {**TRANSFORMERS, "time_step_limit": json.loads(text)}
    assert constructor_arguments(config)["time_step_limit"] == expected


@pytest.mark.parametrize("limit", [[0.0], [0.0, math.nan], [0.0, {}]])
def test_a_time_step_limit_that_is_no_pair(limit):
    with pytest.raises(ValueError, match="`time_step_limit` must be a pair of numbers. Received"):
        constructor_arguments({**TRANSFORMERS, "time_step_limit": limit})


def test_names_of_flash_linear_attention_are_read():
    config = {**TRANSFORMERS, "norm_eps": 1e-6, "dt_limit": [0.001, 0.1]}
    for key in ("layer_norm_epsilon", "time_step_limit"):
        config.pop(key, None)
    arguments = constructor_arguments(config)
    assert arguments["layer_norm_epsilon"] == 1e-6
    assert arguments["time_step_limit"] == (0.001, 0.1)


@pytest.mark.parametrize(
    ("quantized", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized with bitsandbytes"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"are quantized \(`quantization`\)"),
    ],
)
def test_quantized_weights_are_refused_before_they_are_fetched(tmp_path, quantized, message):
    (tmp_path / "config.json").write_text(json.dumps({**TRANSFORMERS, **quantized}))
    with pytest.raises(ValueError, match=f"config.json: .*{message}.*Take the repository"):
        keras_mamba2.Mamba2Backbone.from_preset(tmp_path)
    assert describe(tmp_path)["parameters"]  # for which no weights are needed
    check_unquantized({**TRANSFORMERS, "quantization_config": None})


def test_a_vocabulary_that_was_made_smaller_has_no_padding():
    arguments = vocabulary({"vocab_size": 40, "unpadded_vocab_size": 50})
    assert arguments == {"vocabulary_size": 40, "unpadded_vocabulary_size": 40}
    assert written_vocabulary(arguments) == {"vocab_size": 40}
    padded = {"vocabulary_size": 48, "unpadded_vocabulary_size": 41}
    assert vocabulary(written_vocabulary(padded)) == padded


def test_heads_tell_the_inner_size():
    arguments = constructor_arguments({**TRANSFORMERS, "num_heads": 18, "expand": 2})
    assert arguments["expansion"] == 1.5


@pytest.mark.parametrize("expansion", [2, 1.5, 7 / 3])
def test_back_to_transformers_and_again(expansion):
    arguments = constructor_arguments(ORIGINAL)
    arguments.update(
        expansion=expansion, hidden_dim=15 * 128, time_step_limit=(0.01, None), num_groups=3
    )
    if expansion == 2:
        config = transformers_config(arguments)
    else:
        with pytest.warns(UserWarning, match="is not a whole number: transformers from version 5"):
            config = transformers_config(arguments)
    again = constructor_arguments(json.loads(json.dumps(config)))
    assert again == {k: v for k, v in arguments.items() if k != "a_initializer_range"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "hidden_size": 8}, "Unknown `model_type`. Expected: 'mamba2'"),
        ({"model_type": "mamba", "hidden_size": 8}, "is a Mamba-1 model.*model_type='mamba'"),
        ({"model_type": "gpt2", "n_layer": 12, "n_embd": 768}, "Unknown `model_type`.*'gpt2'"),
        ({**ORIGINAL, "ssm_cfg": {}}, "is a Mamba-1 model"),
        ({**ORIGINAL, "ssm_cfg": {"layer": "Mamba1"}}, "is a Mamba-1 model"),
        ({**ORIGINAL, "attn_layer_idx": [99]}, "`attn_layer_idx` has 99, but n_layer="),
        ({**ORIGINAL, "attn_layer_idx": [1]}, "has no `num_heads`"),
        ({"model_type": "bamba", "attn_layer_indices": [9]}, "has no `hidden_size`"),
        ({"model_type": "zamba3"}, "Unknown `model_type`.*'granitemoehybrid'.*'zamba3'"),
        ({**ZAMBA, "layers_block_type": ["mamba", "lstm"]}, "Unknown kind of layer 'lstm'"),
        ({**ZAMBA, "n_mamba_heads": 7}, "n_mamba_heads must divide"),
        ({**ZAMBA, "use_long_context": True}, "`use_long_context` must be False"),
        ({**NEMOTRON, "hybrid_override_pattern": "M-M?"}, "has '\\?', which is none of 'M'"),
        (
            {**NEMOTRON, "layers_block_type": ["lstm"]},
            "Unknown kind of layer 'lstm'. Known: 'mamba'",
        ),
        (NEMOTRON, "says nothing of its layers"),
        ({**NEMOTRON, "mlp_hidden_act": "gelu"}, "`mlp_hidden_act` must be 'relu2'"),
        ({**GRANITE, "layer_types": ["mamba", "lstm"]}, "Unknown kind of layer 'lstm'"),
        ({**GRANITE, "num_hidden_layers": 3}, "`layer_types` has 2 layers, .*num_hidden_layers=3"),
        (
            {**GRANITE, "mamba_d_head": 7},
            "must be mamba_expand \\* hidden_size, .*Received: 8 \\* 7",
        ),
        ({**BAMBA, "attn_layer_indices": [9]}, "`attn_layer_indices` has 9, .*num_hidden_layers=2"),
        ({**BAMBA, "rope_scaling": {"rope_type": "yarn"}}, "`rope_type` must be 'default'"),
        ({}, "neither `model_type` .* nor `ssm_cfg`.* none"),
        ({"dim": 3}, "Received keys: dim"),
        ({**ORIGINAL, "ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "`rmsnorm` must be True"),
        ({**ORIGINAL, "d_intermediate": 64}, "`d_intermediate` must be 0"),
        (
            {**TRANSFORMERS, "hidden_act": "gelu"},
            "`hidden_act` must be 'silu' or 'swish'. Received",
        ),
        ({"ssm_cfg": {"layer": "Mamba2"}, "n_layer": 1}, "has no `d_model`"),
    ],
)
def test_what_is_not_mamba2_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        constructor_arguments(config)


MIXER_SIZES = {"mamba_num_heads": 8, "mamba_head_dim": 8}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (BAMBA, {"num_key_value_heads": 8, "rotary_dim": 4}),
        ({**BAMBA, "partial_rotary_factor": 1.0}, {"rotary_dim": 4}),
        ({**BAMBA, "rope_parameters": {"partial_rotary_factor": 1.0}}, {"rotary_dim": 8}),
        ({**BAMBA, "num_key_value_heads": None}, {"num_key_value_heads": 4}),
        (
            {**NEMOTRON, **MIXER_SIZES, "vocab_size": 64, "layers_block_type": ["attention"]},
            {"num_key_value_heads": 8, "head_dim": 128},
        ),
    ],
)
def test_attention_is_read_as_by_transformers(config, found):
    """Keys that are left out, or stand where they are not looked for."""
    attention = constructor_arguments(config)["sublayers"]["attention"]
    assert attention.items() >= found.items()


def test_keys_of_nemotron_that_disagree_are_read_as_by_transformers():
    config = {**NEMOTRON, **MIXER_SIZES, "vocab_size": 64, "n_groups": 1, "mamba_n_groups": 2}
    config |= {"layers_block_type": ["mamba"], "hybrid_override_pattern": "M*"}
    arguments = constructor_arguments(config)
    assert arguments["blocks"] == ["mamba2"]
    assert arguments["sublayers"]["mamba2"]["num_groups"] == 2


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "llama"}', '{"ssm_cfg": 3}'])
def test_errors_name_the_file(tmp_path, text):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=f"^{file}"):
        read_constructor_arguments(tmp_path)


def test_layer_types_of_transformers_are_no_attention():
    config = {**TRANSFORMERS, "layer_types": ["linear_attention"] * 24}
    assert format_of(config) == "transformers"


ARCHITECTURES = pathlib.Path(conversion.__file__).with_name("architectures")


@pytest.mark.parametrize("file", sorted(ARCHITECTURES.glob("*.py")), ids=lambda file: file.stem)
def test_what_every_key_that_is_read_may_be_is_known(file):
    source = file.read_text()
    keys = set(re.findall(r'\b(?:config|attention|ssm)(?:\.get\(|\[)"(\w+)"', source))
    for call, arguments in re.findall(r"\b(required|only)\(\w+, ([^)]*)\)", source):
        names = re.findall(r'"(\w+)"', arguments)
        keys |= set(names if call == "required" else names[:1])
    # Limits have many spellings: `values.limits` looks at them.
    assert keys - {"time_step_limit", "dt_limit"} <= set(config_values.BY_KEY)
