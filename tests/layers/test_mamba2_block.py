"""The laws of the block. Those of its mixer: `test_mamba2_mixer.py`."""

import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops
from keras_hub.src.tests.test_case import TestCase

from keras_mamba2.layers import Mamba2Block
from keras_mamba2.layers import Mamba2Mixer
from tests import reference

EPS = np.finfo(np.float32).eps
SIZES = {"hidden_dim": 8, "state_dim": 3, "head_dim": 4, "num_groups": 2, "chunk_size": 3}


def random_block(**arguments):
    block = Mamba2Block(**{**SIZES, **arguments})
    block.build((None, None, 8))
    reference.randomize(block)
    return block


def random_input(b=2, t=6):
    return np.random.default_rng(2).normal(size=(b, t, 8)).astype("float32")


def truth_of(block, x, state=(None, None)):
    config = block.mixer.get_config()
    return reference.block(x, reference.weights_of(block), config, state)


def assert_close(actual, truth):
    actual = ops.convert_to_numpy(actual).astype(np.float64)
    # As for the mixer: 10 is usual.
    assert np.abs(actual - truth).max() <= 32 * EPS * np.abs(truth).max()


def compiled(f):
    """`f` in one program, which on JAX is faster than one for each of its operations."""
    if keras.config.backend() != "jax":
        return f
    import jax

    return jax.jit(f)


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


@pytest.mark.parametrize("arguments", [{}, {"remat": True}])
@pytest.mark.parametrize("with_segments", [False, True])
def test_the_mask_of_an_embedding_is_a_padding_mask(arguments, with_segments):
    block = random_block(**arguments)
    ids = np.array([[0, 0, 1, 2, 3, 4], [5, 4, 3, 2, 1, 1]])
    x = keras.layers.Embedding(6, 8, mask_zero=True)(ids)
    segments = np.array([[0, 0, 0, 0, 1, 1]] * 2) if with_segments else None
    found = block(x, segment_ids=segments)
    plain = ops.convert_to_tensor(ops.convert_to_numpy(x))
    expected = block(plain, padding_mask=ids != 0, segment_ids=segments)
    np.testing.assert_array_equal(found[0, 2:], expected[0, 2:])
    np.testing.assert_array_equal(found[1], expected[1])
    assert not np.array_equal(block(plain, segment_ids=segments)[0, 2:], expected[0, 2:])


class Mamba2BlockTest(TestCase):
    def test_layer(self):
        self.run_layer_test(
            Mamba2Block,
            init_kwargs=SIZES | {"dropout": 0.1},
            input_data={
                "x": ops.convert_to_tensor(random_input()),
                "padding_mask": ops.convert_to_tensor(np.ones((2, 6), "int32")),
            },
            expected_output_shape=(2, 6, 8),
            expected_num_trainable_weights=9,  # the mixer's eight and the norm's
            expected_num_non_trainable_variables=1,  # the seed of the dropout
            run_training_check=False,  # done for the mixer
            run_precision_checks=False,  # it wants every variable in bfloat16
        )


def test_is_the_reference():
    block, x = random_block(layer_norm_epsilon=0.1), random_input()
    assert_close(compiled(block)(x), truth_of(block, x)[0])


def test_a_prefix_and_steps_are_the_whole():
    block, x = random_block(), random_input()
    truth, true_state = truth_of(block, x)
    first, state = compiled(block.call_with_state)(x[:, :3])
    second, state = compiled(block.call_with_state)(x[:, 3:5], state)
    last, state = compiled(block.step)(ops.convert_to_tensor(x[:, 5]), state)
    assert_close(ops.concatenate([first, second, last[:, None]], axis=1), truth)
    for part, true_part in zip(state, true_state, strict=True):
        assert_close(part, true_part)


def test_padding_changes_nothing():
    block, real = random_block(), random_input(b=3, t=4)
    mask, x = np.zeros((3, 6), "int32"), np.full((3, 6, 8), 100.0, "float32")
    starts = (0, 1, 2)  # padded on the right, on both sides, on the left
    for row, start in enumerate(starts):
        mask[row, start : start + 4] = 1
        x[row, start : start + 4] = real[row]
    y, state = compiled(block.call_with_state)(x, padding_mask=mask)
    truth, true_state = truth_of(block, real)
    y = ops.convert_to_numpy(y)
    assert_close(np.stack([y[row, start : start + 4] for row, start in enumerate(starts)]), truth)
    for part, true_part in zip(state, true_state, strict=True):
        assert_close(part, true_part)
    y = ops.convert_to_numpy(compiled(block)(x, padding_mask=mask))
    assert_close(np.stack([y[row, start : start + 4] for row, start in enumerate(starts)]), truth)


@pytest.mark.parametrize(
    ("policy", "residual_in_fp32"),
    [("mixed_bfloat16", True), ("mixed_bfloat16", False), ("bfloat16", True)],
)
def test_the_residual_stream_is_float32_if_asked(policy, residual_in_fp32):
    block = random_block(residual_in_fp32=residual_in_fp32, dtype=policy)
    block.mixer.out_proj.kernel.assign(np.zeros((16, 8)))  # nothing is added
    x = random_input()
    expected = "float32" if residual_in_fp32 else "bfloat16"
    passed_on = ops.convert_to_numpy(ops.cast(ops.cast(x, expected), "float32"))
    y, state = compiled(block.call_with_state)(x)
    one, _ = compiled(block.step)(ops.convert_to_tensor(x[:, 0]), state)
    symbolic = block(keras.KerasTensor(x.shape, "float32"))
    assert {dtype_of(a) for a in (y, one, symbolic)} == {expected}
    assert dtype_of(state.ssm) == "float32"
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(y, "float32")), passed_on)


def test_dropout_drops_what_the_mixer_adds_in_training_only():
    block, x = random_block(dropout=0.5), random_input()
    added = ops.convert_to_numpy(block(x, training=True)) - x
    kept = np.abs(added) > 0
    assert 0.2 < kept.mean() < 0.8
    truth = truth_of(block, x)[0]
    assert_close(compiled(block)(x), truth)
    assert_close(np.where(kept, x + added / 2, truth), truth)


def test_every_argument_survives_a_round_trip_through_json():
    own = {"residual_in_fp32": False, "dropout": 0.2, "layer_norm_epsilon": 1e-6, "name": "b"}
    own["residual_multiplier"] = 0.5
    mixer = {"conv_kernel_size": 3, "use_bias": True, "time_step_limit": [0.01, 0.5]}
    block = Mamba2Block(**SIZES, **own, **mixer, dtype="mixed_bfloat16")
    config = json.loads(json.dumps(block.get_config()))
    again = Mamba2Block.from_config(config)
    assert json.loads(json.dumps(again.get_config())) == config
    assert config | SIZES | own | mixer == config
    assert again.mixer.get_config() == block.mixer.get_config()
    assert again.mixer.dtype_policy.name == again.norm.dtype_policy.name == "mixed_bfloat16"


def test_every_argument_of_the_mixer_reaches_it():
    mixer = Mamba2Mixer(**SIZES)
    for name, parameter in inspect.signature(Mamba2Mixer.__init__).parameters.items():
        if parameter.kind == parameter.POSITIONAL_OR_KEYWORD and name != "self":
            value = mixer.get_config()[name]
            assert Mamba2Block(**SIZES | {name: value}).mixer.get_config()[name] == value


def test_an_unknown_argument_is_refused():
    with pytest.raises((TypeError, ValueError), match="state_size"):
        Mamba2Block(**SIZES, state_size=3)
