"""States in bfloat16: rounded stochastically, so that what is small arrives in the mean."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

import keras_mamba2
from keras_mamba2.layers import Mamba2Mixer
from keras_mamba2.ops.stochastic_rounding import stochastic_round

BELOW, ABOVE = 1.0, 1.0 + 2.0**-7  # neighbours in bfloat16


def rounded(x, index):
    return ops.convert_to_numpy(ops.cast(stochastic_round(x, index), "float32"))


class TestRounding:
    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_keeps_the_mean(self, share, sign):
        """Within 5 standard deviations, over places and over tokens."""
        x = np.full((64, 8, 128), sign * (BELOW + share * (ABOVE - BELOW)), "float32")
        up = np.abs(rounded(x, np.arange(64))) != BELOW
        assert set(np.abs(rounded(x, np.arange(64))).flat) <= {BELOW, ABOVE}
        for axes in (None, (1, 2), 0):  # of all, of each token, of each place
            mean = up.mean(axis=axes)
            count = up.size / np.size(mean)
            assert np.all(np.abs(mean - share) <= 5.5 * np.sqrt(share * (1 - share) / count) + 1e-9)

    def test_neighbours_are_independent(self):
        """In place, in time, and of row and column: correlations of 65,536 pairs are noise."""
        x = np.full((32, 32, 64), (BELOW + ABOVE) / 2, "float32")
        up = (rounded(x, np.arange(32)) != BELOW) - 0.5
        for pair in ((up[1:], up[:-1]), (up[:, 1:], up[:, :-1]), (up[..., 1:], up[..., :-1])):
            assert abs(np.mean(pair[0] * pair[1]) * 4) < 5 / np.sqrt(pair[0].size)

    def test_what_bfloat16_represents_stays(self):
        x = np.random.default_rng(0).normal(size=(3, 1000)).astype(ml_dtypes.bfloat16)
        x[0, :4] = 0.0, -0.0, 1e-37, 3e38
        x = x.astype("float32")
        np.testing.assert_array_equal(rounded(x, np.arange(3)), x)

    def test_what_is_not_finite_stays_so(self):
        x = np.array([[np.inf, -np.inf, np.nan]], "float32")
        assert not np.isfinite(rounded(x, np.zeros(1, "int32"))).any()

    def test_its_gradient_is_one(self):
        jax = pytest.importorskip("jax")
        if keras.backend.backend() != "jax":
            pytest.skip("of jax.grad")
        index = np.zeros(1, "int32")
        x = np.full((1, 5), 1.003, "float32")
        gradient = jax.grad(lambda x: ops.sum(ops.cast(stochastic_round(x, index), "float32")))(x)
        np.testing.assert_array_equal(gradient, np.ones((1, 5)))


def test_a_slow_state_does_not_drift():
    """Of 4,096 tokens, each of which adds less than half a unit: to the nearest nothing arrives."""
    jax = pytest.importorskip("jax")
    h, p, n, t = 4, 8, 16, 4096
    rng = np.random.default_rng(0)
    dt = np.exp(rng.uniform(np.log(1e-4), np.log(3e-4), (t, 1, h))).astype("float32")
    x, B = rng.uniform(0.5, 1.5, (t, 1, h, p)), rng.uniform(0.5, 1.5, (t, 1, 1, n))
    A = -np.ones(h)

    def after_all(dtype, kept):
        def token(state, now):
            x, dt, B, i = now
            new = state.astype(dtype) * np.exp(A, dtype=dtype)[:, None, None] ** dt[..., None, None]
            new = new + (x * dt[..., None])[..., None] * B[:, :, None]
            return kept(new, i[None]), None

        inputs = (x.astype(dtype), dt.astype(dtype), B.astype(dtype), np.arange(t))
        start = kept(jax.numpy.zeros((1, h, p, n), dtype), np.zeros(1, "int32"))
        return np.asarray(jax.lax.scan(token, start, inputs)[0].astype("float32"))

    truth = after_all("float32", lambda x, i: x)
    drawn = after_all("float32", stochastic_round)
    nearest = after_all("float32", lambda x, i: x.astype("bfloat16"))
    error = [np.mean(state / truth) - 1 for state in (drawn, nearest)]
    assert abs(error[0]) < 3e-3
    assert abs(error[1]) > 0.3  # what this is for


@pytest.fixture(scope="module")
def mixer():
    keras.utils.set_random_seed(0)
    layer = Mamba2Mixer(32, state_dim=8, head_dim=8, chunk_size=4, state_dtype="bfloat16")
    layer.build((None, None, 32))
    return layer


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).normal(size=(2, 13, 32)).astype("float32")


class TestMixer:
    def test_ways_agree_within_roundings_of_the_state(self, mixer, x):
        exact = Mamba2Mixer.from_config({**mixer.get_config(), "state_dtype": None})
        exact.build((None, None, 32))
        exact.set_weights(mixer.get_weights())
        truth, state = exact.call_with_state(x)
        y, kept = mixer.call_with_state(x)
        np.testing.assert_allclose(y, truth, atol=1e-6)  # a state is rounded after a call
        scale = np.abs(state.ssm).max()
        assert str(kept.ssm.dtype) == "bfloat16"
        assert np.abs(np.asarray(kept.ssm, "float32") - state.ssm).max() < 2.0**-7 * scale
        now, ys = mixer.initial_state(2), []
        for i in range(13):
            out, now = mixer.step(x[:, i], now)
            ys.append(out)
        np.testing.assert_array_equal(now.length, [13, 13])
        error = np.abs(np.stack(ys, 1) - truth)
        assert 0 < error.max() < 2.0**-7 * np.abs(truth).max() * 4

    def test_padding_changes_nothing(self, mixer, x):
        mask = np.ones((2, 13), bool)
        mask[1, 9:] = False
        _, state = mixer.call_with_state(x, mask=mask)
        _, alone = mixer.call_with_state(x[1:, :9])
        np.testing.assert_array_equal(state.length, [13, 9])
        np.testing.assert_allclose(
            np.asarray(state.ssm[1], "float32"), np.asarray(alone.ssm[0], "float32"), rtol=2.0**-7
        )
        _, after = mixer.step(x[:, 0], state, mask=np.array([True, False]))
        for old, new in zip(state, after, strict=True):
            np.testing.assert_array_equal(np.asarray(new)[1], np.asarray(old)[1])

    def test_an_open_chunk_is_rounded_once(self, mixer, x):
        _, state = mixer.call_with_state(x[:, :5])
        chunk = mixer.open_chunk(2, 4)
        _, chunk = mixer.extend(x[:, 5:9], state, chunk, 0)
        after = mixer.commit(state, chunk, np.array([4, 0]))
        _, whole = mixer.call_with_state(x[:, 5:9], state)
        np.testing.assert_array_equal(after.length, [9, 5])
        np.testing.assert_array_equal(np.asarray(after.ssm)[1], np.asarray(state.ssm)[1])
        close = np.isclose(
            np.asarray(after.ssm[0], "float32"), np.asarray(whole.ssm[0], "float32"), rtol=1e-5
        )
        assert close.mean() > 0.99  # but where float32 rounds to the other side of a number drawn


@pytest.fixture(scope="module")
def lm(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(str(preset_folder), state_dtype="bfloat16")
    lm.compile(sampler=keras_mamba2.FilterSampler(temperature=0.9))
    return lm


class TestModel:
    def test_bytes_are_half(self, lm, preset_folder):
        plain = keras_mamba2.Mamba2CausalLM.from_preset(str(preset_folder))
        states = lm.prefill("To be"), plain.prefill("To be")
        ssm, whole = (sum(layer.ssm.nbytes for layer in state.layers) for state in states)
        assert 2 * ssm == whole
        assert states[0].nbytes < states[1].nbytes

    def test_a_row_is_what_it_is_alone(self, lm):
        prompts = ["To be, or", "ROMEO: what light"]
        together = lm.generate(prompts, max_new_tokens=20, seed=3)
        assert together == [lm.generate(p, max_new_tokens=20, seed=3) for p in prompts]

    def test_saved_is_what_was_in_memory(self, lm, tmp_path):
        session = lm.start("Once upon")
        session.generate(" a time", max_new_tokens=5, seed=1)
        session.save(tmp_path / "state.safetensors")
        again = lm.resume(tmp_path / "state.safetensors")
        texts = [s.generate("", max_new_tokens=20, seed=2) for s in (session, again)]
        assert texts[0] == texts[1]

    def test_a_preset_keeps_it(self, lm, tmp_path):
        lm.save_to_preset(tmp_path / "kept")
        again = keras_mamba2.Mamba2CausalLM.from_preset(str(tmp_path / "kept"))
        assert again.backbone.state_dtype == "bfloat16"

    def test_a_state_of_another_dtype_is_refused(self, lm, preset_folder):
        plain = keras_mamba2.Mamba2CausalLM.from_preset(str(preset_folder))
        with pytest.raises(ValueError, match="belongs to another model"):
            plain.generate(" be", state=lm.prefill("To"), max_new_tokens=2)

    @pytest.mark.parametrize("value", ["float16", "int4", 8])
    def test_other_dtypes_are_refused(self, value, preset_folder):
        with pytest.raises(ValueError, match="state_dtype"):
            keras_mamba2.Mamba2CausalLM.from_preset(str(preset_folder), state_dtype=value)
