"""The laws of the mixer; `tests/reference.py` is the truth."""

import inspect
import json
import math
from typing import ClassVar

import keras
import numpy as np
import pytest
from keras import ops
from keras_hub.src.tests.test_case import TestCase

from keras_mamba2.layers import Mamba2Mixer
from keras_mamba2.layers import MixerState
from tests import reference

EPS = np.finfo(np.float32).eps
SIZES = {"hidden_dim": 8, "state_dim": 3, "head_dim": 4, "chunk_size": 3}


def random_mixer(**arguments):
    mixer = Mamba2Mixer(**{**SIZES, "num_groups": 2, **arguments})
    mixer.build((None, None, 8))
    reference.randomize(mixer)
    return mixer


def random_input(b=2, t=7):
    return np.random.default_rng(1).normal(size=(b, t, 8)).astype("float32")


def truth_of(mixer, x, state=(None, None)):
    return reference.mixer(x, reference.weights_of(mixer), mixer.get_config(), state)


def assert_close(actual, truth, eps=EPS):
    actual = ops.convert_to_numpy(ops.cast(actual, "float32")).astype(np.float64)
    assert actual.shape == truth.shape
    # Two products of matrices, a norm and the recurrence after one another: 10 is usual.
    error = np.abs(actual - truth).max(initial=0.0)
    assert error <= 32 * eps * np.abs(truth).max(initial=0.0)


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def compiled(f):
    """`f` in one program, which on JAX is faster than one for each of its operations."""
    if keras.config.backend() != "jax":
        return f
    import jax

    return jax.jit(f)


class Mamba2MixerTest(TestCase):
    @pytest.mark.slow
    def test_layer(self):
        self.run_layer_test(
            Mamba2Mixer,
            init_kwargs=SIZES | {"num_groups": 2, "use_bias": True},
            input_data={
                "x": ops.convert_to_tensor(random_input()),
                "mask": ops.convert_to_tensor(np.ones((2, 7), bool)),
            },
            expected_output_shape=(2, 7, 8),
            # kernels and biases of in_proj, out_proj and the convolution, norm, A_log, dt_bias, D
            expected_num_trainable_weights=10,
            run_precision_checks=False,  # it wants every variable in bfloat16: see TestDtypes
        )


class TestReference:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"num_groups": 4, "time_step_limit": (0.05, 0.3)},
            {"num_groups": 1, "expansion": 1, "head_dim": 2, "chunk_size": 64},
            {"expansion": 1.5, "num_groups": 3, "conv_kernel_size": 1},
            {"use_bias": True, "use_conv_bias": False, "conv_kernel_size": 3},
            {"time_step_limit": (0.05, math.inf), "layer_norm_epsilon": 0.1},
        ],
        ids=str,
    )
    def test_output_and_state_are_the_reference(self, arguments):
        mixer, x = random_mixer(**arguments), random_input()
        y, state = compiled(mixer.call_with_state)(x)
        truth, true_state = truth_of(mixer, x)
        assert_close(y, truth)
        assert_close(state.conv, true_state[0])
        assert_close(state.ssm, true_state[1])

    def test_call_is_the_output_of_call_with_state(self):
        mixer, x = random_mixer(), random_input()
        assert_close(mixer(x), truth_of(mixer, x)[0])

    def test_limits_of_the_step_sizes_bind(self):
        """Else the cases above would say nothing of them."""
        x = random_input()
        free, limited = (
            truth_of(random_mixer(time_step_limit=limit), x)[0] for limit in (None, (0.05, 0.3))
        )
        assert np.abs(free - limited).max() > 0.1 * np.abs(free).max()


class TestState:
    def test_a_prefix_and_steps_are_the_whole_at_every_split(self):
        mixer, x = random_mixer(), random_input(t=5)
        truth, true_state = truth_of(mixer, x)
        call_with_state, step = compiled(mixer.call_with_state), compiled(mixer.step)
        for split in range(6):
            state, ys = mixer.initial_state(2), []
            if split > 0:
                y, state = call_with_state(x[:, :split])
                ys = list(np.moveaxis(ops.convert_to_numpy(y), 1, 0))
            for i in range(split, 5):
                y, state = step(ops.convert_to_tensor(x[:, i]), state)
                ys.append(ops.convert_to_numpy(y))
            assert_close(np.stack(ys, axis=1), truth)
            for part, true_part in zip(state, true_state, strict=True):
                assert_close(part, true_part)

    @pytest.mark.parametrize("split", [2, 6])
    def test_two_parts_are_the_whole(self, split):
        mixer, x = random_mixer(), random_input(t=8)
        call_with_state = compiled(mixer.call_with_state)
        first, state = call_with_state(x[:, :split], mixer.initial_state(2))
        second, state = call_with_state(x[:, split:], state)
        truth, true_state = truth_of(mixer, x)
        assert_close(ops.concatenate([first, second], axis=1), truth)
        for part, true_part in zip(state, true_state, strict=True):
            assert_close(part, true_part)

    def test_the_initial_state_is_that_of_no_token(self):
        mixer, x = random_mixer(), random_input()
        state = mixer.initial_state(2)
        assert isinstance(state, MixerState)
        for without, with_zeros in zip(
            keras.tree.flatten(compiled(mixer.call_with_state)(x)),
            keras.tree.flatten(compiled(mixer.call_with_state)(x, state)),
            strict=True,
        ):
            np.testing.assert_array_equal(
                ops.convert_to_numpy(without), ops.convert_to_numpy(with_zeros)
            )

    def test_a_step_that_is_masked_leaves_the_state_exactly_as_it_was(self):
        mixer, x = random_mixer(), random_input(b=3)
        step, token = compiled(mixer.step), ops.convert_to_tensor(x[:, 5])
        _, before = compiled(mixer.call_with_state)(x[:, :5])
        y, after = step(token, before)
        masked_y, masked = step(token, before, ops.convert_to_tensor([True, False, True]))
        for old, new, actual in zip(before, after, masked, strict=True):
            old, new, actual = map(ops.convert_to_numpy, (old, new, actual))
            np.testing.assert_array_equal(actual[1], old[1])
            assert_close(actual[::2], new[::2])
        y, masked_y = map(ops.convert_to_numpy, (y, masked_y))
        assert_close(masked_y[::2], y[::2])


class TestPadding:
    # Rows of 4 real tokens: nothing padded, right, left, both; and one of 7, and one of none.
    SPANS = ((0, 4), (0, 4), (3, 7), (2, 6), (0, 7), (0, 0))

    @pytest.mark.parametrize("with_state", [False, True])
    def test_changes_nothing(self, with_state):
        mixer, real, t = random_mixer(), random_input(b=6), 7
        mask = np.zeros((6, t), bool)
        x = np.full((6, t, 8), 1e3, "float32")  # what is padded is not looked at
        for row, (start, end) in enumerate(self.SPANS):
            mask[row, start:end] = True
            x[row, start:end] = real[row, : end - start]
        call_with_state, before = compiled(mixer.call_with_state), mixer.initial_state(6)
        if with_state:
            _, before = call_with_state(random_input(b=6)[::-1].copy(), before, mask | True)
        y, after = call_with_state(x, before, mask)
        y, *after = map(ops.convert_to_numpy, (y, *after))
        before = list(map(ops.convert_to_numpy, before))
        for row, (start, end) in enumerate(self.SPANS):
            here = slice(row, row + 1)
            if start == end:
                np.testing.assert_array_equal(after[0][here], before[0][here])
                np.testing.assert_array_equal(after[1][here], before[1][here])
                continue
            truth, true_state = truth_of(
                mixer, real[here, : end - start], [part[here] for part in before]
            )
            assert_close(y[here, start:end], truth)
            assert_close(after[0][here], true_state[0])
            assert_close(after[1][here], true_state[1])


@pytest.mark.skipif(keras.config.backend() != "jax", reason="takes gradients with jax.jacrev")
def test_no_output_depends_on_a_later_or_a_padded_input():
    import jax

    mixer, x = random_mixer(), random_input(b=1)
    mask = np.array([[False, True, True, True, True, True, False]])
    jacobian = jax.jit(jax.jacrev(lambda x: mixer(x, mask=mask).sum(axis=(0, 2))))(x)
    size = np.abs(jacobian).sum(axis=(1, 3))[1:6]  # (real target, source)
    np.testing.assert_array_equal(np.triu(size, 2), 0)  # the last column is a pad as well
    np.testing.assert_array_equal(size[:, 0], 0)
    assert np.all(size[:, 1:6][np.tril_indices(5)] > 0)


class TestDtypes:
    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
    def test_the_recurrence_is_float32_whatever_the_policy(self, policy):
        mixer = random_mixer(dtype=policy)
        parameters = {mixer.A_log.dtype, mixer.dt_bias.dtype, mixer.D.dtype}
        x = ops.cast(random_input(), "bfloat16")
        y, state = compiled(mixer.call_with_state)(x)
        one, stepped = compiled(mixer.step)(x[:, 0], state)
        assert parameters == {"float32"}
        for s in (state, stepped, mixer.initial_state(2)):
            assert (dtype_of(s.conv), dtype_of(s.ssm)) == ("bfloat16", "float32")
        assert {dtype_of(y), dtype_of(one)} == {"bfloat16"}

        truth, true_state = truth_of(mixer, ops.convert_to_numpy(ops.cast(x, "float32")))
        # 2 or 3 roundings' worth is usual: of the projections, of the convolution, of the output.
        assert_close(y, truth, eps=2.0**-8 / 4)
        assert_close(state.conv, true_state[0], eps=2.0**-8 / 4)
        assert_close(state.ssm, true_state[1], eps=2.0**-8 / 4)

    def test_a_step_size_is_not_rounded_to_bfloat16(self):
        """A float32 dt_bias shows in the state, though in_proj gives bfloat16."""
        mixer, x = random_mixer(dtype="mixed_bfloat16"), ops.cast(random_input(), "bfloat16")
        _, before = compiled(mixer.call_with_state)(x)
        mixer.dt_bias.assign_add(np.full(4, 1e-4, "float32"))
        _, after = compiled(lambda x: mixer.call_with_state(x))(x)  # a new program, new weights
        change = ops.convert_to_numpy(after.ssm) / ops.convert_to_numpy(before.ssm) - 1
        assert 1e-5 < np.median(np.abs(change)) < 1e-3


class TestConfig:
    ARGUMENTS: ClassVar = {
        "hidden_dim": 12,
        "state_dim": 3,
        "head_dim": 6,
        "num_groups": 2,
        "expansion": 1,
        "conv_kernel_size": 3,
        "chunk_size": 5,
        "use_bias": True,
        "use_conv_bias": False,
        "use_output_bias": False,
        "gated_norm": "before_gate",
        "projection_multipliers": (1.0, 0.5, 2.0, 0.25, 3.0),
        "layer_norm_epsilon": 1e-6,
        "time_step_limit": (0.01, 0.5),
        "time_step_min": 0.01,
        "time_step_max": 0.2,
        "time_step_floor": 0.02,
        "a_initializer_range": (1, 2),
        "num_residual_layers": 3,
        "state_dtype": "bfloat16",
    }

    def test_every_argument_survives_a_round_trip_through_json(self):
        named = {
            name
            for name, parameter in inspect.signature(Mamba2Mixer.__init__).parameters.items()
            if parameter.kind == parameter.POSITIONAL_OR_KEYWORD
        }
        assert named - {"self"} == self.ARGUMENTS.keys()
        config = Mamba2Mixer(**self.ARGUMENTS).get_config()
        assert config | self.ARGUMENTS == config
        again = Mamba2Mixer.from_config(json.loads(json.dumps(config)))
        assert again.get_config() == config

    def test_no_limit_and_infinite_limits_are_one(self):
        for limit in (None, (0.0, None), (0.0, math.inf), [0, math.inf]):
            mixer = Mamba2Mixer(**SIZES, time_step_limit=limit)
            assert mixer.get_config()["time_step_limit"] == (0.0, None)


class TestInitialisation:
    def test_step_sizes_and_decays_are_in_their_ranges(self):
        mixer = Mamba2Mixer(
            64,
            head_dim=1,
            time_step_min=0.001,
            time_step_max=0.1,
            time_step_floor=0.01,
            a_initializer_range=(2, 3),
        )
        mixer.build((None, None, 64))
        weights = reference.weights_of(mixer)
        A, dt = np.exp(weights["A_log"]), reference.softplus(weights["dt_bias"])
        assert 2 * (1 - 4 * EPS) <= A.min() < A.max() <= 3 * (1 + 4 * EPS)
        # softplus undoes its inverse up to cancellation: some 10 roundings at small steps
        assert 0.01 * (1 - 1e-5) <= dt.min() < dt.max() <= 0.1 * (1 + 1e-5)
        assert np.mean(dt < 0.0101) > 0.3  # half of them are below the floor
        np.testing.assert_array_equal(weights["D"], 1)

    def test_more_residual_layers_make_out_proj_smaller(self):
        bounds = []
        for layers in (1, 16):
            mixer = Mamba2Mixer(64, num_residual_layers=layers)
            mixer.build((None, None, 64))
            bounds.append(np.abs(reference.weights_of(mixer)["out_proj/kernel"]).max())
        np.testing.assert_allclose(bounds, [128**-0.5, 128**-0.5 / 4], rtol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_dim": 0}, "`hidden_dim` must be a positive integer. Received: hidden_dim=0"),
        ({"state_dim": -1}, "`state_dim` must be a positive integer. Received: state_dim=-1"),
        (
            {"conv_kernel_size": 0},
            "`conv_kernel_size` must be a positive integer. Received: conv_kernel_size=0",
        ),
        (
            {"chunk_size": 0},
            "`chunk_size` must be a positive integer, or None. Received: chunk_size=0",
        ),
        (
            {"head_dim": 5},
            "`head_dim` must divide.*head_dim=5, expansion=2, hidden_dim=8, so inner size 16",
        ),
        ({"expansion": 0.01}, "`head_dim` must divide.*expansion=0.01.*inner size 0"),
        ({"num_groups": 3}, "`num_groups` must divide.*num_groups=3, number of heads 4"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Mixer(**SIZES | change)


def test_an_input_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"hidden_dim=8.*\(2, 7, 9\)"):
        Mamba2Mixer(**SIZES)(np.ones((2, 7, 9), "float32"))
