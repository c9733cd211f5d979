"""Checks operations and mixer against `tests/reference.py` on the backend KERAS_BACKEND names.

Run as `python -m tests.backend_check`, which `tests/ops/test_backends.py` does: a process has one
backend. Prints the name of each check that passes.
"""

import functools

import keras
import numpy as np
from keras import ops

from keras_mamba2.layers import Mamba2Mixer
from keras_mamba2.ops import causal_conv1d
from keras_mamba2.ops import causal_conv1d_step
from keras_mamba2.ops import ssd
from keras_mamba2.ops import ssd_step
from keras_mamba2.ops.stochastic_rounding import stochastic_round
from tests import reference

EPS = np.finfo(np.float32).eps
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


b, t, h, p, g, n, k = 2, 7, 4, 2, 2, 3, 4
SSD = {
    "x": normal(b, t, h, p),
    "dt": rng.uniform(size=(b, t, h)).astype("float32"),
    "A": -rng.uniform(0.1, 1.0, size=h).astype("float32"),
    "B": normal(b, t, g, n),
    "C": normal(b, t, g, n),
    "D": normal(h),
    "initial_state": normal(b, h, p, n),
}
IDS = np.int32([[3, 3, 3, 1, 1, 3, 3], [0, 0, 0, 0, 0, 0, 1]])
CONV = {"x": normal(b, t, 5), "kernel": normal(k, 5), "bias": normal(5)}
CONV["conv_state"] = normal(b, k - 1, 5)
UP = (0, 0, 1, 1, 0, 0, 1, 0)  # which of the first normal numbers are rounded up
MASK = np.array([[0, 1, 1, 1, 1, 0, 0], [1] * 7], bool)


def assert_close(actual, truth, roundings):
    actual = np.asarray(ops.convert_to_numpy(actual), np.float64)
    assert actual.shape == truth.shape, (actual.shape, truth.shape)
    error = np.abs(actual - truth).max() / (EPS * np.abs(truth).max())
    assert error <= roundings, f"{error} times float32's eps"


def assert_all_close(results, truths, roundings=16):
    for actual, truth in zip(results, truths, strict=True):
        assert_close(actual, truth, roundings)


def squares(results):
    """The sum of the squares of all results, in numpy."""
    return sum((part * part).sum() for part in results)


def gradients(f, inputs):
    """The gradients of the sum of the squares of `f(**inputs)` in all inputs."""

    def loss(inputs):
        return sum(ops.sum(part * part) for part in f(**inputs))

    inputs = {name: ops.convert_to_tensor(value) for name, value in inputs.items()}
    if keras.config.backend() == "torch":
        inputs = {name: value.requires_grad_() for name, value in inputs.items()}
        loss(inputs).backward()
        return {name: value.grad for name, value in inputs.items()}
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = loss(inputs)
    return tape.gradient(value, inputs)


def masked_conv(x, kernel, bias, conv_state):
    """Row 0 is real at positions 1 to 4, row 1 everywhere; the others are left out."""
    y, state = causal_conv1d(x, kernel, bias, conv_state, mask=MASK)
    return y[:1, 1:5], y[1:], state


def true_masked_conv(x, kernel, bias, conv_state):
    y0, state0 = reference.causal_conv1d(x[:1, 1:5], kernel, bias, conv_state[:1])
    y1, state1 = reference.causal_conv1d(x[1:], kernel, bias, conv_state[1:])
    return y0, y1, np.concatenate([state0, state1])


def packed(op, **options):
    return functools.partial(op, segment_ids=IDS, **options)


def check_ssd():
    for chunk_size in (1, 3, 64):
        assert_all_close(ssd(**SSD, chunk_size=chunk_size), reference.ssd(**SSD))
        packed_result = packed(ssd, chunk_size=chunk_size)(**SSD)
        assert_all_close(packed_result, packed(reference.ssd)(**SSD))
    required = {name: SSD[name] for name in ("x", "dt", "A", "B", "C")}
    assert_all_close(ssd(**required), reference.ssd(**required))


def check_ssd_gradients():
    truth = reference.gradients(lambda **a: squares(packed(reference.ssd)(**a)), SSD)
    actual = gradients(packed(ssd, chunk_size=3), SSD)
    assert_all_close([actual[name] for name in SSD], [truth[name] for name in SSD], 32)


def check_large_decays():
    inputs = SSD | {"A": SSD["A"] * 1e3}
    assert_all_close(ssd(**inputs, chunk_size=3), reference.ssd(**inputs))
    for value in gradients(functools.partial(ssd, chunk_size=3), inputs).values():
        assert np.isfinite(ops.convert_to_numpy(value)).all()


def check_ssd_step():
    state, ys = SSD["initial_state"], []
    for i in range(t):
        token = {name: SSD[name][:, i] for name in ("x", "dt", "B", "C")}
        y, state = ssd_step(**token, A=SSD["A"], D=SSD["D"], state=state)
        ys.append(y)
    assert_all_close((ops.stack(ys, axis=1), state), reference.ssd(**SSD))


def check_causal_conv1d():
    assert_all_close(causal_conv1d(**CONV), reference.causal_conv1d(**CONV))
    assert_all_close(masked_conv(**CONV), true_masked_conv(**CONV))
    assert_all_close(packed(causal_conv1d)(**CONV), packed(reference.causal_conv1d)(**CONV))
    short = CONV | {"x": CONV["x"][:, :2]}
    assert_all_close(causal_conv1d(**short), reference.causal_conv1d(**short))


def check_causal_conv1d_gradients():
    truth = reference.gradients(lambda **a: squares(true_masked_conv(**a)), CONV)
    actual = gradients(masked_conv, CONV)
    assert_all_close([actual[name] for name in CONV], [truth[name] for name in CONV], 32)


def check_causal_conv1d_step():
    state, ys = CONV["conv_state"], []
    for i in range(t):
        y, state = causal_conv1d_step(
            CONV["x"][:, i], CONV["kernel"], CONV["bias"], conv_state=state
        )
        ys.append(y)
    assert_all_close((ops.stack(ys, axis=1), state), reference.causal_conv1d(**CONV))


def random_mixer():
    mixer = Mamba2Mixer(8, state_dim=3, head_dim=4, num_groups=2, chunk_size=3)
    x = normal(b, t, 8)
    mixer.build(x.shape)
    reference.randomize(mixer)
    return mixer, x, reference.mixer(x, reference.weights_of(mixer), mixer.get_config())


def check_mixer():
    mixer, x, (y, state) = random_mixer()
    # Some 10 operations with float32 results, one after the other.
    assert_close(mixer(x), y, 64)
    first, here = mixer.call_with_state(ops.convert_to_tensor(x[:, :3]))
    ys = [*ops.unstack(first, axis=1)]
    for i in range(3, t):
        one, here = mixer.step(ops.convert_to_tensor(x[:, i]), here)
        ys.append(one)
    assert_all_close((ops.stack(ys, axis=1), *here), (y, *state), 64)


def check_rounded_state():
    """Of all backends the same bits, but where float32 rounds another way."""
    x = np.random.default_rng(0).normal(size=(2, 3, 50)).astype("float32")
    drawn = ops.cast(stochastic_round(ops.convert_to_tensor(x), np.arange(2)), "float32")
    drawn = ops.convert_to_numpy(drawn)
    assert_close(drawn, x, 2.0**16)
    np.testing.assert_array_equal((np.abs(drawn) > np.abs(x))[0, 0, :8], [*map(bool, UP)])
    mixer, x, _ = random_mixer()
    mixer.state_dtype = "bfloat16"
    _, state = mixer.call_with_state(ops.convert_to_tensor(x))
    y, state = mixer.step(ops.convert_to_tensor(x[:, 0]), state)
    assert keras.backend.standardize_dtype(state.ssm.dtype) == "bfloat16"
    assert np.isfinite(ops.convert_to_numpy(ops.cast(y, "float32"))).all()


def check_tensorflow_graphs():
    """Batch size and length are unknown while TensorFlow traces."""
    import tensorflow as tf

    def traced(f, length=None, jit_compile=None, **inputs):
        known = {"x", "dt", "B", "C", "mask", "segment_ids"}  # (b t ...)
        signature = [
            tf.TensorSpec(
                [None, length, *value.shape[2:]]
                if name in known
                else [None, *value.shape[1:]]
                if name.endswith("state")
                else value.shape,
                value.dtype,
            )
            for name, value in inputs.items()
        ]

        @functools.partial(
            tf.function, input_signature=signature, autograph=False, jit_compile=jit_compile
        )
        def graph(*values):
            return f(**dict(zip(inputs, values, strict=True)))

        return graph(*inputs.values())

    for chunk_size in (3, 64):
        op = functools.partial(ssd, chunk_size=chunk_size)
        assert_all_close(traced(op, **SSD), reference.ssd(**SSD))
        assert_all_close(traced(op, **SSD, segment_ids=IDS), reference.ssd(**SSD, segment_ids=IDS))
    required = {name: SSD[name] for name in ("x", "dt", "A", "B", "C")}
    assert_all_close(traced(ssd, **required), reference.ssd(**required))

    truth = reference.gradients(lambda **a: squares(reference.ssd(**a)), SSD)
    op = functools.partial(ssd, chunk_size=3)
    actual = traced(lambda **inputs: gradients(op, inputs), **SSD)
    assert_all_close([actual[name] for name in SSD], [truth[name] for name in SSD], 32)
    # XLA has no gradient of a loop whose end is not known.
    actual = traced(lambda **inputs: gradients(op, inputs), length=t, jit_compile=True, **SSD)
    assert_all_close([actual[name] for name in SSD], [truth[name] for name in SSD], 32)

    assert_all_close(traced(causal_conv1d, **CONV), reference.causal_conv1d(**CONV))
    y, state = traced(causal_conv1d, **CONV, mask=MASK)
    assert_all_close((y[:1, 1:5], y[1:], state), true_masked_conv(**CONV))

    mixer, x, (y, _) = random_mixer()
    assert_close(traced(mixer, x=x), y, 64)


if __name__ == "__main__":
    checks = [
        check_ssd,
        check_ssd_gradients,
        check_large_decays,
        check_ssd_step,
        check_causal_conv1d,
        check_causal_conv1d_gradients,
        check_causal_conv1d_step,
        check_mixer,
        check_rounded_state,
    ]
    if keras.config.backend() == "tensorflow":
        checks.append(check_tensorflow_graphs)
    for check in checks:
        check()
        print(check.__name__)
