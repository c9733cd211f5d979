"""Arguments of layers: each value of the wrong type or range is named, before weights are made."""

import numpy as np
import pytest

from keras_mamba2 import layers
from tests import bad_values
from tests.bad_values import NAN
from tests.bad_values import NO_BOOLEAN
from tests.bad_values import NO_DTYPE
from tests.bad_values import NO_NUMBER
from tests.bad_values import NO_OPTIONAL_SIZE
from tests.bad_values import NO_PAIR
from tests.bad_values import NO_POSITIVE
from tests.bad_values import NO_RATE
from tests.bad_values import NO_SIZE
from tests.bad_values import named

OF_ALL = {"dtype": NO_DTYPE, "name": [3, b"a"], "trainable": ["x", 1, None]}
MIXER = {
    "hidden_dim": NO_SIZE,
    "state_dim": NO_SIZE,
    "head_dim": [*NO_SIZE, 3, 5],
    "num_groups": [*NO_SIZE, 3],
    "expansion": [*NO_POSITIVE, 1e-9],
    "conv_kernel_size": NO_SIZE,
    "chunk_size": NO_OPTIONAL_SIZE,
    "use_bias": NO_BOOLEAN,
    "use_conv_bias": NO_BOOLEAN,
    "use_output_bias": [value for value in NO_BOOLEAN if value is not None],
    "gated_norm": ["after", None, 3, ["none"], True],
    "projection_multipliers": [(1, 1), "12345", (1, 1, 1, 1, NAN), [1] * 6, 3, [None] * 5],
    "layer_norm_epsilon": NO_POSITIVE,
    "time_step_limit": [*NO_PAIR, (0, 0), (None, 1), (0.1, 0.1)],
    "time_step_min": [*NO_POSITIVE, 0.2],
    "time_step_max": NO_POSITIVE,
    "time_step_floor": [*NO_NUMBER, -1e-5],
    "a_initializer_range": [*NO_PAIR, None, (0, 1), (-1, 1), (2, 1)],
    "num_residual_layers": NO_SIZE,
}
NORM = {"num_groups": NO_SIZE, "epsilon": NO_POSITIVE, "norm_before_gate": NO_BOOLEAN}
BLOCK = {
    "hidden_dim": NO_SIZE,
    "residual_in_fp32": NO_BOOLEAN,
    "dropout": NO_RATE,
    "remat": NO_BOOLEAN,
    "layer_norm_epsilon": NO_POSITIVE,
    "residual_multiplier": NO_NUMBER,
}
ATTENTION = {
    "hidden_dim": NO_SIZE,
    "num_query_heads": [*NO_SIZE, 3],
    "num_key_value_heads": [*NO_SIZE, 3],
    "head_dim": NO_SIZE,
    "rotary_dim": [*bad_values.NO_INTEGER, None, -2, 3, 10],
    "rope_max_wavelength": NO_POSITIVE,
    "scale": [value for value in NO_NUMBER if value is not None],
    "key_multiplier": NO_NUMBER,
    "use_bias": NO_BOOLEAN,
}
MLP = {
    "hidden_dim": NO_SIZE,
    "intermediate_dim": NO_SIZE,
    "activation": ["sillu", None, 3, ["silu"], np.tanh],
    "gated": NO_BOOLEAN,
    "gate_multiplier": NO_NUMBER,
    "use_bias": NO_BOOLEAN,
}
EXPERTS = {
    "hidden_dim": NO_SIZE,
    "intermediate_dim": NO_SIZE,
    "num_experts": NO_SIZE,
    "num_experts_per_token": [*NO_SIZE, 5],
    "activation": ["sillu", None, 3],
    "gated": NO_BOOLEAN,
    "scoring": ["sigmoyd", None, 3, ["softmax"]],
    "num_expert_groups": [*NO_SIZE, 2],
    "num_groups_per_token": NO_SIZE,
    "normalize_weights": NO_BOOLEAN,
    "weights_multiplier": NO_NUMBER,
    "latent_dim": NO_OPTIONAL_SIZE,
    "use_bias": NO_BOOLEAN,
}
SMALL = {
    layers.Mamba2Mixer: {"hidden_dim": 8, "state_dim": 4, "head_dim": 4},
    layers.GatedRMSNormalization: {},
    layers.Mamba2Block: {"hidden_dim": 8, "state_dim": 4, "head_dim": 4},
    layers.Attention: {
        "hidden_dim": 8,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    layers.MLP: {"hidden_dim": 8, "intermediate_dim": 16},
    layers.MixtureOfExperts: {
        "hidden_dim": 8,
        "intermediate_dim": 16,
        "num_experts": 4,
        "num_experts_per_token": 2,
    },
}


def refused(cls, name, value):
    bad_values.assert_argument_refused(cls, name, **SMALL[cls] | {name: value})


@named(MIXER | OF_ALL)
def test_of_a_mixer(name, value):
    refused(layers.Mamba2Mixer, name, value)


@named(NORM | OF_ALL)
def test_of_a_norm(name, value):
    refused(layers.GatedRMSNormalization, name, value)


@named(BLOCK | OF_ALL | {"state_dim": NO_SIZE})
def test_of_a_block(name, value):
    refused(layers.Mamba2Block, name, value)


@named(ATTENTION | OF_ALL)
def test_of_attention(name, value):
    refused(layers.Attention, name, value)


@named(MLP | OF_ALL)
def test_of_an_mlp(name, value):
    refused(layers.MLP, name, value)


@named(EXPERTS | OF_ALL)
def test_of_experts(name, value):
    refused(layers.MixtureOfExperts, name, value)


@named(
    {
        "sublayers": [3, None, [3], "mlp", {"a": 1}],
        "input_multipliers": [(1, 1), 3, "1", (NAN,), (None,), ("1",)],
        "output_multipliers": [(), (1, 1), (True,)],
    }
)
def test_of_parallel_sublayers(name, value):
    arguments = {"sublayers": [layers.MLP(8, 16, name="mlp")], name: value}
    bad_values.assert_argument_refused(layers.Parallel, name, **arguments)


def test_a_block_takes_a_sublayer():
    bad_values.assert_argument_refused(layers.HybridBlock, "sublayer", hidden_dim=8, sublayer="mlp")


@pytest.mark.parametrize("units", NO_SIZE, ids=repr)
def test_a_projection_has_a_size(units):
    bad_values.assert_argument_refused(layers.Projection, "units", units=units)


@pytest.mark.parametrize("cls", SMALL)
@pytest.mark.parametrize("keyword", ["hiden_dim", "use_bais", "whatever", "input_shape"])
def test_unknown_keywords(cls, keyword):
    bad_values.assert_refused(
        cls, **SMALL[cls] | {keyword: 1}, match=f"has no argument `{keyword}`"
    )


@pytest.mark.parametrize("cls", [cls for cls in SMALL if SMALL[cls]])
def test_numbers_of_numpy_are_numbers(cls):
    layer = cls(**{name: np.int64(value) for name, value in SMALL[cls].items()})
    config = layer.get_config()
    for name, value in SMALL[cls].items():
        assert (config[name], type(config[name])) == (value, int)
    layer.build((None, None, 8))


def test_limits_of_step_sizes():
    for limit in (None, (0, None), (0.0, float("inf")), [0, None], np.array([0, np.inf])):
        assert layers.Mamba2Mixer(8, 4, 4, time_step_limit=limit).time_step_limit == (0.0, None)
    mixer = layers.Mamba2Mixer(8, 4, 4, time_step_limit=np.array([0.5, 1], "float32"))
    assert mixer.time_step_limit == (0.5, 1.0)
