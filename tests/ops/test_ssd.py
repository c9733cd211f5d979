"""The laws of `ssd` and `ssd_step`, for the definition in `keras.ops` and for the path on JAX."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
from jax import numpy as jnp

from keras_mamba2.ops import ssd
from keras_mamba2.ops import ssd_step
from keras_mamba2.ops.ssd import ssd as definition
from keras_mamba2.ops.ssd import ssd_step as step_definition
from tests import laws
from tests import reference

EPS = np.finfo(np.float32).eps
both = pytest.mark.parametrize("op", [ssd, definition], ids=["jax", "definition"])
both_steps = pytest.mark.parametrize("step", [ssd_step, step_definition], ids=["jax", "definition"])
examples = laws.examples(10)
# Of t and chunk_size: length 1; below, at and above the chunk size; odd lengths; whole chunks.
lengths = pytest.mark.parametrize(
    ("t", "chunk_size"), [(1, 16), (13, 5), (13, 13), (13, 64), (16, 4), (17, 16)]
)


SMALL = {"t": 11, "p": 2, "n": 3}  # where every element's gradient is computed on its own


def random_inputs(seed, b=2, t=13, h=4, p=3, g=2, n=5, rate=1.0):
    """Inputs whose decays a step lie between exp(-rate) and 1."""
    rng = np.random.default_rng(seed)
    inputs = {
        "x": rng.normal(size=(b, t, h, p)),
        "dt": rng.uniform(size=(b, t, h)),
        "A": -rate * rng.uniform(0.1, 1.0, size=h),
        "B": rng.normal(size=(b, t, g, n)),
        "C": rng.normal(size=(b, t, g, n)),
        "D": rng.normal(size=h),
        "initial_state": rng.normal(size=(b, h, p, n)),
    }
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def positions(inputs, which):
    """The inputs at some positions, or at one."""
    return {
        name: value[:, which] if name in ("x", "dt", "B", "C") else value
        for name, value in inputs.items()
    }


@functools.cache
def jitted(op):
    return jax.jit(op, static_argnames="chunk_size")


def terms(inputs):
    """The sums of the sizes of what is added up: what the rounding errors are relative to."""
    return reference.ssd(
        **{
            name: value if name in ("A", "segment_ids") else np.abs(value)
            for name, value in inputs.items()
        }
    )


def rounding_errors(result, inputs, eps=EPS):
    """The largest error of y and of the state in units of eps of the terms of each element."""
    return [
        np.max(np.abs(np.asarray(actual, np.float64) - true) / (eps * size))
        for actual, true, size in zip(result, reference.ssd(**inputs), terms(inputs), strict=True)
    ]


def assert_is_the_recurrence(result, inputs, eps=EPS):
    # A term is a product of five factors, one of them an exponential: 1 or 2 is usual, 5 is not.
    assert max(rounding_errors(result, inputs, eps)) <= 8


def weights_of_the_loss(inputs):
    """Weights of y and of the state: the gradient of their weighted sum tells all outputs apart."""
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=inputs[name].shape).astype(np.float32) for name in ("x", "initial_state")
    ]


def weighted_sum(result, weights):
    return sum((part * weight).sum() for part, weight in zip(result, weights, strict=True))


@functools.cache
def jitted_gradients(op, chunk_size):
    """`(inputs, weights, segment_ids)` to the results and the gradients in every input."""

    def loss(inputs, weights, segment_ids):
        result = op(**inputs, segment_ids=segment_ids, chunk_size=chunk_size)
        return weighted_sum(result, weights), result

    def gradients(inputs, weights, segment_ids=None):
        return jax.grad(loss, has_aux=True)(inputs, weights, segment_ids)

    return jax.jit(gradients)


class TestRecurrence:
    @both
    @lengths
    @examples
    @given(seed=st.integers(0, 2**32 - 1), rate=st.sampled_from([1e-3, 0.1, 1.0, 10.0, 60.0]))
    def test_chunked_is_the_recurrence(self, op, t, chunk_size, seed, rate):
        inputs = random_inputs(seed, t=t, rate=rate)
        assert_is_the_recurrence(jitted(op)(**inputs, chunk_size=chunk_size), inputs)

    @both
    @pytest.mark.parametrize("chunk_size", [64, 256])
    @pytest.mark.parametrize("size", [1e4, 1e6, 1e32])
    def test_huge_steps_spoil_nothing_after_them(self, op, chunk_size, size):
        inputs = random_inputs(0, t=256, rate=0.1)
        is_huge = np.random.default_rng(1).random(inputs["dt"].shape) < 0.3
        inputs["x"] = np.where(is_huge[..., None], inputs["x"] / np.float32(size), inputs["x"])
        inputs["dt"] = np.where(is_huge, np.float32(size), inputs["dt"])
        assert_is_the_recurrence(jitted(op)(**inputs, chunk_size=chunk_size), inputs)

    @both
    def test_a_state_beyond_float16(self, op):
        inputs = random_inputs(0, t=40, rate=1e-3)
        inputs["B"], inputs["C"] = inputs["B"] * 1e4, inputs["C"] * 1e-4
        narrow = {name: inputs[name].astype("float16") for name in ("x", "B", "C")}
        y, state = jitted(op)(**inputs | narrow, chunk_size=8)
        assert np.abs(state).max() > np.finfo("float16").max
        exact = reference.ssd(**inputs | narrow)
        rms = np.sqrt(np.mean(exact[0] ** 2))
        assert np.abs(y - exact[0]).max() < 2**-8 * rms

    @both
    @pytest.mark.parametrize("g", [1, 4])
    def test_heads_use_their_group(self, op, g):
        inputs = random_inputs(0, g=g)
        assert_is_the_recurrence(jitted(op)(**inputs, chunk_size=5), inputs)

    @both
    @pytest.mark.parametrize("absent", ["D", "initial_state"])
    def test_what_is_optional_is_zero(self, op, absent):
        inputs = random_inputs(0)
        zeros = inputs | {absent: np.zeros_like(inputs[absent])}
        del inputs[absent]
        assert_is_the_recurrence(jitted(op)(**inputs, chunk_size=5), zeros)

    @both
    @pytest.mark.parametrize("chunk_size", [1, 1000])
    def test_the_chunk_size_changes_nothing_but_rounding(self, op, chunk_size):
        inputs = random_inputs(1)
        here, elsewhere = (jitted(op)(**inputs, chunk_size=q) for q in (chunk_size, 5))
        for a, b, size in zip(here, elsewhere, terms(inputs), strict=True):
            assert np.all(np.abs(np.asarray(a) - np.asarray(b)) <= 16 * EPS * size)

    @both
    @pytest.mark.parametrize("chunk_size", [4, 64])
    def test_no_step_leaves_the_state_exactly_as_it_was(self, op, chunk_size):
        inputs = random_inputs(2)
        inputs["dt"] = np.zeros_like(inputs["dt"])
        _, state = jitted(op)(**inputs, chunk_size=chunk_size)
        np.testing.assert_array_equal(state, inputs["initial_state"])

    @both
    def test_no_steps_after_a_sequence_leave_its_state_exactly_as_it_was(self, op):
        inputs = random_inputs(2, t=16)
        inputs["dt"][:, 8:] = 0
        _, state = jitted(op)(**inputs, chunk_size=4)
        _, before = jitted(op)(**positions(inputs, slice(8)), chunk_size=4)
        np.testing.assert_array_equal(state, before)

    @both
    def test_bfloat16_inputs_keep_a_float32_state(self, op):
        inputs = random_inputs(3)
        for name in ("x", "B", "C"):
            inputs[name] = jnp.asarray(inputs[name], jnp.bfloat16)
        y, state = result = jitted(op)(**inputs, chunk_size=5)
        assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
        rounded = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
        assert_is_the_recurrence(result, rounded, eps=2.0**-8)  # half a unit in the last place

    @both
    def test_float64_inputs_are_computed_in_float64(self, op):
        with jax.enable_x64(True):
            inputs = {name: np.float64(value) for name, value in random_inputs(3).items()}
            result = jitted(op)(**inputs, chunk_size=5)
        assert result[0].dtype == result[1].dtype == np.float64
        assert_is_the_recurrence(result, inputs, eps=np.finfo(np.float64).eps)


def with_large_steps(large_steps):
    """Slow decays, but for some steps of exp(-60) in the middle."""
    inputs = random_inputs(4, t=64, g=1, rate=8.0)
    inputs["dt"] *= 0.002
    inputs["dt"][:, 20 : 20 + large_steps] = 60.0 / np.abs(inputs["A"])
    return inputs


class TestLargeDecays:
    @both
    @pytest.mark.parametrize("chunk_size", [16, 64])
    @pytest.mark.parametrize("large_steps", [1, 10])
    def test_slow_decays_after_large_ones_keep_their_digits(self, op, large_steps, chunk_size):
        inputs = with_large_steps(large_steps)
        assert_is_the_recurrence(jitted(op)(**inputs, chunk_size=chunk_size), inputs)

    @pytest.mark.parametrize("large_steps", [1, 10])
    def test_which_differences_of_a_float32_cumulative_sum_do_not(self, large_steps):
        """The formula as the paper writes it fails the law above: the law is worth its name."""
        inputs = with_large_steps(large_steps)
        x, dt, A, B, C, D = (inputs[name] for name in ("x", "dt", "A", "B", "C", "D"))
        sums = np.moveaxis(np.cumsum(dt * A, axis=1), 1, -1)  # (b h t)
        decay = np.tril(np.exp(np.minimum(sums[..., :, None] - sums[..., None, :], 0)))
        y = np.einsum("blgn,bsgn,bhls,bshp->blhp", C, B, decay, x * dt[..., None])
        y += np.einsum("blgn,bhpn,bhl->blhp", C, inputs["initial_state"], np.exp(sums))
        y += D[:, None] * x
        assert y.dtype == np.float32
        state = reference.ssd(**inputs)[1]
        assert rounding_errors((y, state), inputs)[0] > 80

    @both
    @pytest.mark.parametrize("rate", [60.0, 1e4])
    def test_gradients_stay_finite(self, op, rate):
        inputs = random_inputs(5, **SMALL, rate=rate)
        gradients, _ = jitted_gradients(op, 64)(inputs, weights_of_the_loss(inputs))
        assert all(np.isfinite(value).all() for value in gradients.values())


class TestSegments:
    @both
    @pytest.mark.parametrize("chunk_size", [5, 64])
    @examples
    @given(ids=st.lists(st.integers(0, 2), min_size=13, max_size=13), seed=st.integers(0, 9))
    @example(ids=[7] * 4 + [2] * 3 + [7] * 6, seed=0)  # an id that comes back
    @example(ids=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], seed=0)
    def test_a_packed_row_is_its_documents_alone(self, op, chunk_size, ids, seed):
        inputs = random_inputs(seed, b=1)
        y, final_state = map(
            np.asarray,
            jitted(op)(**inputs, segment_ids=np.int32([ids]), chunk_size=chunk_size),
        )
        starts = [i for i in range(13) if i == 0 or ids[i] != ids[i - 1]]
        for start, end in itertools.pairwise([*starts, 13]):
            document = positions(inputs, slice(start, end))
            if start > 0:  # the initial state belongs to the first
                document["initial_state"] = np.zeros_like(inputs["initial_state"])
            state = final_state if end == 13 else reference.ssd(**document)[1]
            assert_is_the_recurrence((y[:, start:end], state), document)

    @both
    def test_rows_have_their_own_segments(self, op):
        ids = np.int32([[0, 0, 1, 1, 1, 1, 2, 2, 0, 0, 0, 0, 0], [5] * 13])
        inputs = random_inputs(6) | {"segment_ids": ids}
        assert_is_the_recurrence(jitted(op)(**inputs, chunk_size=5), inputs)


class TestGradients:
    @both
    @pytest.mark.parametrize(("chunk_size", "packed"), [(64, False), (3, True)])
    def test_gradients_are_those_of_the_recurrence(self, op, packed, chunk_size):
        inputs = random_inputs(7, **SMALL)
        ids = np.int32([[0] * 4 + [1] * 3 + [0] * 4, [0] * 10 + [1]]) if packed else None
        weights = weights_of_the_loss(inputs)
        actual, _ = jitted_gradients(op, chunk_size)(inputs, weights, ids)
        truth = reference.gradients(
            lambda **inputs: weighted_sum(reference.ssd(**inputs, segment_ids=ids), weights), inputs
        )
        assert actual.keys() == truth.keys() == inputs.keys()
        for name, value in truth.items():
            error = np.abs(np.asarray(actual[name], np.float64) - value).max()
            # A gets a sum over positions of both signs, hence the most roundings, about 10.
            assert error <= 32 * EPS * np.abs(value).max(), name

    @both
    @pytest.mark.parametrize("rate", [8.0, 60.0])
    def test_gradients_through_large_decays(self, op, rate):
        inputs = random_inputs(8, **SMALL, rate=rate)
        weights = weights_of_the_loss(inputs)
        actual, _ = jitted_gradients(op, 64)(inputs, weights)
        truth = reference.gradients(
            lambda **inputs: weighted_sum(reference.ssd(**inputs), weights), inputs
        )
        # The gradient of a log decay is a difference of sums of <dy, y>. Where the decay is large
        # nothing is left of them but their rounding.
        sums = weighted_sum(terms(inputs), map(np.abs, weights))
        sums = {"dt": sums * np.abs(inputs["A"]).max(), "A": sums * inputs["dt"].sum(1).max()}
        for name, value in truth.items():
            scale = max(np.abs(value).max(), sums.get(name, 0.0))
            error = np.abs(np.asarray(actual[name], np.float64) - value).max()
            assert error <= 32 * EPS * scale, name

    @both
    def test_no_output_depends_on_a_later_input_or_on_another_document(self, op):
        t = 7
        inputs = random_inputs(9, b=1, t=t, p=2, n=3)
        ids = np.int32([[0, 0, 1, 1, 1, 0, 0]])
        at_positions = {name: inputs.pop(name) for name in ("x", "dt", "B", "C")}

        @jax.jit
        @jax.jacrev
        def jacobian(at_positions):
            y, _ = op(**at_positions, **inputs, segment_ids=ids, chunk_size=3)
            return y.sum(axis=(0, 2, 3))

        for name, value in jacobian(at_positions).items():
            size = np.abs(value).reshape(t, t, -1).max(-1)  # (target source)
            np.testing.assert_array_equal(np.triu(size, 1), 0, err_msg=name)
            assert np.all(np.diagonal(size) > 0), name
            # In dt, on JAX, two sums cancel there; all else is exactly zero.
            leak = 8 * EPS * size.max() if name == "dt" else 0.0
            assert max(size[2:5, :2].max(), size[5:, :5].max()) <= leak, name


class TestState:
    @both
    def test_continuing_is_the_whole_at_every_split(self, op):
        inputs = random_inputs(10, t=6)
        for split in range(1, 6):
            first, state = jitted(op)(**positions(inputs, slice(split)), chunk_size=4)
            rest = positions(inputs, slice(split, None)) | {"initial_state": state}
            second, state = jitted(op)(**rest, chunk_size=4)
            assert_is_the_recurrence((np.concatenate([first, second], axis=1), state), inputs)

    @both_steps
    @pytest.mark.parametrize("g", [1, 2])
    @pytest.mark.parametrize("D", [True, False])
    def test_steps_are_the_sequence(self, step, g, D):
        inputs = random_inputs(11, g=g)
        if not D:
            del inputs["D"]
        step, state, ys = jax.jit(step), inputs["initial_state"], []
        for i in range(13):
            token = positions(inputs, i)
            del token["initial_state"]
            y, state = step(**token, state=state)
            ys.append(y)
        assert_is_the_recurrence((np.stack(ys, axis=1), state), inputs)

    @both_steps
    def test_a_step_of_bfloat16_keeps_a_float32_state(self, step):
        inputs = positions(random_inputs(12), 0)
        state = inputs.pop("initial_state")
        for name in ("x", "B", "C"):
            inputs[name] = jnp.asarray(inputs[name], jnp.bfloat16)
        y, new_state = step(**inputs, state=state)
        assert (y.dtype, new_state.dtype) == (jnp.bfloat16, jnp.float32)
        inputs = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
        truth = reference.ssd_step(**inputs, state=state)
        # The output is rounded once, the state not at all.
        assert np.all(np.abs(np.asarray(y, np.float64) - truth[0]) <= 2**-8 * np.abs(truth[0]))
        np.testing.assert_allclose(
            new_state, truth[1], rtol=0, atol=4 * EPS * np.abs(truth[1]).max()
        )

    @both_steps
    def test_a_step_of_zero_leaves_the_state_exactly_as_it_was(self, step):
        inputs = positions(random_inputs(13), 0)
        state = inputs.pop("initial_state")
        inputs["dt"] = np.zeros_like(inputs["dt"])
        np.testing.assert_array_equal(step(**inputs, state=state)[1], state)


# As to the truth: A gets a sum over positions of both signs, hence the most roundings.
@pytest.mark.parametrize(("dtype", "eps"), [("float32", EPS), ("bfloat16", 2.0**-8)])
def test_the_two_paths_are_one_operation(dtype, eps):
    inputs = random_inputs(14, **SMALL)
    for name in ("x", "B", "C"):
        inputs[name] = jnp.asarray(inputs[name], dtype)
    ids = np.int32([[0] * 4 + [1] * 3 + [0] * 4, [0] * 10 + [1]])
    arguments = inputs, weights_of_the_loss(inputs), ids
    for a, b in zip(
        jax.tree.leaves(jitted_gradients(ssd, 3)(*arguments)),
        jax.tree.leaves(jitted_gradients(definition, 3)(*arguments)),
        strict=True,
    ):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= 32 * eps * np.abs(b).max()


BAD = {
    "x": ({"x": np.ones((13, 4, 3))}, r"`x` must have shape \(b t h p\).*\(13, 4, 3\)"),
    "dt": ({"dt": np.ones((2, 12, 4))}, r"`dt`.*t=13, as in `x`.*\(2, 12, 4\)"),
    "A": ({"A": -np.ones(5)}, r"`A`.*h=4, as in `x`.*\(5,\)"),
    "B": ({"B": np.ones((1, 13, 2, 5))}, r"`B`.*b=2, as in `x`.*\(1, 13, 2, 5\)"),
    "C": ({"C": np.ones((2, 13, 2, 6))}, r"`C`.*n=5, as in `B`.*\(2, 13, 2, 6\)"),
    "D": ({"D": np.ones((4, 3))}, r"`D` must have shape \(h\).*\(4, 3\)"),
    "initial_state": (
        {"initial_state": np.ones((2, 4, 5, 3))},
        r"`initial_state`.*p=3, as in `x`.*\(2, 4, 5, 3\)",
    ),
    "segment_ids": ({"segment_ids": np.ones((2, 14))}, r"`segment_ids`.*t=13.*\(2, 14\)"),
    "groups": (
        {"B": np.ones((2, 13, 3, 5)), "C": np.ones((2, 13, 3, 5))},
        r"groups must divide the number of heads.*3 groups in `B` and `C`, 4 heads in `x`",
    ),
    "chunk_size": ({"chunk_size": 0}, "`chunk_size` must be a positive integer.*chunk_size=0"),
    "length": (
        {
            name: np.ones((2, 0, *shape))
            for name, shape in {"x": (4, 3), "dt": (4,), "B": (2, 5), "C": (2, 5)}.items()
        },
        r"`x`.*where t is at least one.*\(2, 0, 4, 3\)",
    ),
}


@both
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name_and_value(op, change, message):
    with pytest.raises(ValueError, match=message):
        op(**random_inputs(0) | change)


@both_steps
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((2, 1, 4, 3))}, r"`x` must have shape \(b h p\).*\(2, 1, 4, 3\)"),
        ({"dt": np.ones((2, 3))}, r"`dt`.*h=4, as in `x`.*\(2, 3\)"),
        ({"state": np.ones((2, 4, 3, 6))}, r"`state`.*n=5, as in `B`.*\(2, 4, 3, 6\)"),
        ({"B": np.ones((2, 3, 5)), "C": np.ones((2, 3, 5))}, "3 groups in `B` and `C`, 4 heads"),
    ],
)
def test_bad_input_of_a_step_is_refused_by_name_and_value(step, change, message):
    inputs = positions(random_inputs(0), 0)
    inputs["state"] = inputs.pop("initial_state")
    with pytest.raises(ValueError, match=message):
        step(**inputs | change)
