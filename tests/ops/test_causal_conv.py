"""The laws of `causal_conv1d` and its step."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_mamba2.ops import causal_conv1d
from keras_mamba2.ops import causal_conv1d_step
from tests import laws
from tests import reference

EPS = np.finfo(np.float32).eps
examples = laws.examples(15)
kernel_sizes = pytest.mark.parametrize("k", [1, 3, 4])
with_and_without_state = pytest.mark.parametrize("with_state", [False, True])


def random_inputs(seed, k, b=4, t=6, e=3, with_state=True):
    rng = np.random.default_rng(seed)
    shapes = {"x": (b, t, e), "kernel": (k, e), "bias": (e,), "conv_state": (b, k - 1, e)}
    inputs = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    return inputs if with_state else inputs | {"conv_state": None}


def assert_is_the_convolution(y, state, inputs, eps=EPS):
    truth, true_state = reference.causal_conv1d(**inputs)
    sizes = {name: None if a is None else np.abs(a) for name, a in inputs.items()}
    error = np.abs(np.asarray(ops.convert_to_numpy(y), np.float64) - truth)
    # At most k products and k sums, each rounded once.
    assert np.all(error <= 5 * eps * reference.causal_conv1d(**sizes)[0])
    np.testing.assert_array_equal(ops.convert_to_numpy(state), true_state)


@kernel_sizes
@with_and_without_state
@pytest.mark.parametrize("t", [1, 2, 6])
@pytest.mark.parametrize("with_bias", [False, True])
def test_each_position_sees_its_last_inputs(k, t, with_state, with_bias):
    inputs = random_inputs(0, k, t=t, with_state=with_state)
    if not with_bias:
        inputs["bias"] = None
    assert_is_the_convolution(*causal_conv1d(**inputs), inputs)


@kernel_sizes
@with_and_without_state
@pytest.mark.parametrize("t", [2, 6])
@examples
@given(data=st.data())
def test_padding_on_either_side_changes_nothing(k, t, with_state, data):
    """Rows of any length, down to no real token, anywhere in the sequence."""
    starts = data.draw(st.lists(st.integers(0, t), min_size=4, max_size=4))
    spans = [(start, data.draw(st.integers(start, t))) for start in starts]
    inputs = random_inputs(data.draw(st.integers(0, 9)), k, t=t, with_state=with_state)
    mask = np.zeros((4, t), bool)
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
    padded = np.where(mask[..., None], inputs["x"], np.float32("nan"))  # nothing of it is seen
    y, state = map(ops.convert_to_numpy, causal_conv1d(**inputs | {"x": padded}, mask=mask))
    for row, (start, end) in enumerate(spans):
        alone = inputs | {"x": inputs["x"][row : row + 1, start:end]}
        if with_state:
            alone["conv_state"] = inputs["conv_state"][row : row + 1]
        if start < end:
            assert_is_the_convolution(y[row : row + 1, start:end], state[row : row + 1], alone)
        else:  # no real token: the state stays
            before = inputs["conv_state"][row] if with_state else np.zeros((k - 1, 3))
            np.testing.assert_array_equal(state[row], before)


@kernel_sizes
@pytest.mark.parametrize("with_bias", [False, True])
def test_steps_are_the_sequence(k, with_bias):
    inputs = random_inputs(1, k)
    fixed = {"kernel": inputs["kernel"], "bias": inputs["bias"] if with_bias else None}
    state, ys = inputs["conv_state"], []
    for i in range(6):
        y, state = causal_conv1d_step(inputs["x"][:, i], **fixed, conv_state=state)
        ys.append(y)
    assert_is_the_convolution(ops.stack(ys, axis=1), state, inputs | fixed)


@kernel_sizes
def test_continuing_is_the_whole_at_every_split(k):
    inputs = random_inputs(2, k)
    for split in range(1, 6):
        first, state = causal_conv1d(**inputs | {"x": inputs["x"][:, :split]})
        second, state = causal_conv1d(**inputs | {"x": inputs["x"][:, split:], "conv_state": state})
        assert_is_the_convolution(ops.concatenate([first, second], axis=1), state, inputs)


@kernel_sizes
@with_and_without_state
@examples
@given(ids=st.lists(st.integers(0, 2), min_size=6, max_size=6), seed=st.integers(0, 9))
def test_each_segment_is_alone(k, with_state, ids, seed):
    """Also with padding around the row, that has the ids next to it. Ids may come back."""
    inputs = random_inputs(seed, k, with_state=with_state) | {"segment_ids": np.int32([ids] * 4)}
    truth, true_state = reference.causal_conv1d(**inputs)
    around = {
        "x": np.pad(inputs["x"], [(0, 0), (2, 1), (0, 0)], constant_values=np.float32("nan")),
        "segment_ids": np.pad(inputs["segment_ids"], [(0, 0), (2, 1)], mode="edge"),
        "mask": np.pad(np.ones((4, 6), bool), [(0, 0), (2, 1)]),
    }
    for changes, start in (({}, 0), (around, 2)):
        y, state = causal_conv1d(**inputs | changes)
        np.testing.assert_allclose(y[:, start : start + 6], truth, rtol=0, atol=50 * EPS)
        np.testing.assert_array_equal(state, true_state)


@pytest.mark.parametrize("with_mask", [False, True])
def test_outputs_and_state_have_the_dtype_of_the_input(with_mask):
    inputs = random_inputs(3, 4)
    inputs["x"] = ops.cast(inputs["x"], "bfloat16")  # kernel, bias and state are float32
    y, state = causal_conv1d(**inputs, mask=np.ones((4, 6), bool) if with_mask else None)
    assert {keras.backend.standardize_dtype(a.dtype) for a in (y, state)} == {"bfloat16"}
    for name in ("x", "kernel", "bias", "conv_state"):  # as the operation rounds them
        inputs[name] = ops.convert_to_numpy(ops.cast(ops.cast(inputs[name], "bfloat16"), "float32"))
    assert_is_the_convolution(y, state, inputs, eps=2.0**-8)
    y, state = causal_conv1d_step(
        ops.cast(inputs["x"][:, 0], "bfloat16"),
        inputs["kernel"],
        inputs["bias"],
        conv_state=inputs["conv_state"],
    )
    assert {keras.backend.standardize_dtype(a.dtype) for a in (y, state)} == {"bfloat16"}


@pytest.mark.skipif(keras.config.backend() != "jax", reason="takes gradients with jax.grad")
class TestGradients:
    # The first row is padded on both sides, the second on the left, the third has no real token.
    MASK = np.array([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0] * 6, [1] * 6], bool)

    @pytest.mark.parametrize("k", [1, 4])
    def test_gradients_are_those_of_the_real_tokens(self, k):
        import jax

        inputs = random_inputs(4, k)
        rng = np.random.default_rng(4)
        y_weights = np.float32(rng.normal(size=(4, 6, 3))) * self.MASK[..., None]
        state_weights = np.float32(rng.normal(size=(4, k - 1, 3)))

        def loss(inputs):
            y, state = causal_conv1d(**inputs, mask=self.MASK)
            return (y * y_weights).sum() + (state * state_weights).sum()

        def true_loss(x, kernel, bias, conv_state):
            total = (conv_state[2] * state_weights[2]).sum()
            for row in (0, 1, 3):
                here = self.MASK[row]
                y, state = reference.causal_conv1d(
                    x[row : row + 1, here], kernel, bias, conv_state[row : row + 1]
                )
                total = total + (y * y_weights[row, here]).sum()
                total = total + (state * state_weights[row]).sum()
            return total

        truth = reference.gradients(true_loss, inputs)
        for name, actual in jax.jit(jax.grad(loss))(inputs).items():
            scale = np.abs(truth[name]).max(initial=0.0)
            # Kernel and bias get sums over all positions and rows: 24 roundings at most.
            np.testing.assert_allclose(actual, truth[name], rtol=0, atol=24 * EPS * scale)
            if name == "x":
                np.testing.assert_array_equal(np.asarray(actual)[~self.MASK], 0)

    def test_no_output_depends_on_a_later_input_or_on_one_out_of_reach(self):
        import jax

        inputs = random_inputs(5, 3, b=1)
        x = inputs.pop("x")
        jacobian = jax.jit(jax.jacrev(lambda x: causal_conv1d(x, **inputs)[0].sum(axis=(0, 2))))(x)
        size = np.abs(jacobian).sum(axis=(1, 3))  # (target source)
        t = np.arange(6)
        reached = (t[:, None] >= t) & (t[:, None] < t + 3)
        np.testing.assert_array_equal(size > 0, reached)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((4, 6))}, r"`x` must have shape \(b t e\).*\(4, 6\)"),
        ({"kernel": np.ones((4, 2))}, r"`kernel`.*e=3, as in `x`.*\(4, 2\)"),
        ({"bias": np.ones(2)}, r"`bias`.*e=3, as in `x`.*\(2,\)"),
        ({"conv_state": np.ones((4, 4, 3))}, r"`conv_state`.*k-1=3 .*\(4, 4, 3\).*\(4, 3\)"),
        ({"conv_state": np.ones((3, 3, 3))}, r"`conv_state`.*b=4, as in `x`.*\(3, 3, 3\)"),
        ({"mask": np.ones((4, 5), bool)}, r"`mask`.*t=6, as in `x`.*\(4, 5\)"),
        ({"segment_ids": np.ones((4, 5))}, r"`segment_ids`.*t=6, as in `x`.*\(4, 5\)"),
    ],
)
def test_bad_input_is_refused_by_name_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**random_inputs(0, 4) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((4, 6, 3))}, r"`x` must have shape \(b e\).*\(4, 6, 3\)"),
        ({"kernel": np.ones((4, 2))}, r"`kernel`.*e=3, as in `x`.*\(4, 2\)"),
        # Too short a state would be broadcast, were it let through.
        ({"conv_state": np.ones((4, 0, 3))}, r"`conv_state`.*k-1=3 .*\(4, 0, 3\).*\(4, 3\)"),
    ],
)
def test_bad_input_of_a_step_is_refused_by_name_and_value(change, message):
    inputs = random_inputs(0, 4)
    inputs["x"] = inputs["x"][:, 0]
    with pytest.raises(ValueError, match=message):
        causal_conv1d_step(**inputs | change)
