"""The forecaster is its definition in float64, whatever the unit, the company or the gaps."""

import functools

import jax
import keras
import numpy as np
import pytest
import torch
from keras import ops

import keras_mamba2
from tests import reference

EPS = np.finfo(np.float32).eps
SMALL = {"hidden_dim": 16, "state_dim": 4, "head_dim": 8, "chunk_size": 4}
NAN = np.nan


@pytest.fixture(scope="module")
def forecaster():
    model = keras_mamba2.Mamba2Forecaster(5, 3, output_features=[2, 0], **SMALL)
    reference.randomize(model)
    model.compile(optimizer=keras.optimizers.SGD(1e-2), loss="mse", metrics=["mae"])
    return model


def random_rows():
    """Multiples of 1/64, so that sums with other such numbers are exact, with gaps."""
    x = np.round(np.random.default_rng(0).normal(size=(5, 12, 3)) * 64).astype("float32") / 64
    x[0, :3] = NAN  # the series starts late
    x[1, 4:6, 1] = NAN
    x[1, 7] = NAN  # a whole step
    x[2, :, 0] = 7  # never varies
    x[2, 1:, 2] = NAN  # observed once
    x[3, 10:] = NAN  # the last steps
    return x


def truth_of(model, row):
    """The forecast of one row `(t f)`, in float64."""
    weights, config = reference.weights_of(model), model.blocks[0].mixer.get_config()
    row = row[np.isfinite(row).any(axis=1).argmax() :].astype(np.float64)
    mean, scale = np.nanmean(row, axis=0), np.nanstd(row, axis=0)
    scaled = np.nan_to_num((row - mean) / np.where(scale > 0, scale, 1))
    x = np.concatenate([scaled, np.isfinite(row)], axis=1)[None]
    x = reference.dense(x, weights, "embedding")
    for i in range(model.num_layers):
        x, _ = reference.block(x, reference.below(f"block_{i}", weights), config)
    x = reference.gated_rms_normalization(
        x[0, -1], weights["final_norm/scale"], epsilon=config["layer_norm_epsilon"]
    )
    outputs = list(model.output_features)
    y = reference.dense(x, weights, "head").reshape(model.horizon, len(outputs))
    return mean[outputs] + scale[outputs] * y


def test_is_its_definition(forecaster):
    x = random_rows()
    truth = np.stack([truth_of(forecaster, row) for row in x])
    y = forecaster.predict(x, verbose=0)
    assert np.abs(y - truth).max() <= 8 * EPS * np.abs(truth).max()  # 1 is usual
    assert (y[2] == [x[2, 0, 2], 7]).all()  # what does not vary stays
    # Without its late start the row is a shorter series.
    shorter = forecaster.predict(x[:1, 3:], verbose=0)
    assert np.abs(shorter - truth[:1]).max() <= 8 * EPS * np.abs(truth).max()


def test_rows_do_not_know_of_each_other(forecaster):
    x = random_rows()
    order = [3, 1, 4, 0, 2]
    together = forecaster.predict(x, verbose=0)
    np.testing.assert_array_equal(forecaster.predict(x[order], verbose=0), together[order])


def test_units_do_not_matter(forecaster):
    x = random_rows()
    y = forecaster.predict(x, verbose=0)
    # A power of two changes no rounding.
    np.testing.assert_array_equal(forecaster.predict(4 * x, verbose=0), 4 * y)
    shifted = forecaster.predict(x + 1024, verbose=0)
    assert np.abs(shifted - y - 1024).max() <= 8 * EPS * 1024  # 1 is usual


@pytest.mark.parametrize("exponent", [-80, 70])
def test_nor_do_extreme_ones(forecaster, exponent):
    """Whose squares are no numbers of float32."""
    x, unit = random_rows(), np.float32(2.0) ** exponent
    y = forecaster.predict(x, verbose=0)
    np.testing.assert_array_equal(forecaster.predict(unit * x, verbose=0), unit * y)


def test_nor_does_a_large_offset(forecaster):
    """Of 168 values whose sum has an ulp of 16."""
    x = np.round(np.random.default_rng(0).normal(size=(3, 168, 3)) * 16).astype("float32") / 16
    shifted = forecaster.predict(x + 2**20, verbose=0) - 2**20
    y = forecaster.predict(x, verbose=0)
    np.testing.assert_allclose(shifted, y, rtol=0, atol=2 * EPS * 2**20)


def test_a_constant_is_one_whatever_it_is(forecaster):
    """Though sums of it are rounded."""
    forecasts = []
    for constant in (7, 0.1, 1 / 3, 1e30):
        x = random_rows()
        x[:, :, 1] = constant
        forecasts.append(forecaster.predict(x, verbose=0))
    for forecast in forecasts[1:]:
        np.testing.assert_array_equal(forecast, forecasts[0])


def test_integers_are_the_numbers_that_they_are(forecaster):
    """Also beyond int32, which JAX has alone."""
    x = np.random.default_rng(0).integers(0, 9, (2, 12, 3)) * 2**30
    y = np.full((2, 5, 2), 2**33)
    expected = forecaster.predict(x.astype("float32"), verbose=0)
    np.testing.assert_array_equal(forecaster.predict(x, verbose=0), expected)
    losses = [forecaster.evaluate(*data, verbose=0) for data in ((x, y), (1.0 * x, 1.0 * y))]
    assert losses[0] == losses[1]
    for use in (forecaster.fit, forecaster.evaluate):
        with pytest.raises(ValueError, match="Values must be below 3.4e.38. Received: 1e.39"):
            use(np.where(x > 0, 1e39, x), y)
        with pytest.raises(ValueError, match="Targets must be below"):
            use(x, 1e39 * y)


def test_a_mask_is_another_word_for_nan(forecaster):
    x = random_rows()
    y = forecaster.predict(x, verbose=0)
    mask = np.isfinite(x)
    values = np.where(mask, x, 1e6)
    masked = forecaster.predict({"values": values, "mask": mask}, verbose=0)
    assert np.abs(masked - y).max() <= 8 * EPS * np.abs(y).max()
    # A mask of steps, and NaN beside it.
    x[:, 3:8] = NAN
    y = forecaster.predict(x, verbose=0)
    steps = np.ones((5, 12), bool)
    steps[:, 3:8] = False
    values = random_rows()
    values[:, 3:8] = 1e6
    masked = forecaster.predict({"values": values, "mask": steps}, verbose=0)
    assert np.abs(masked - y).max() <= 8 * EPS * np.abs(y).max()


def test_gaps_have_no_gradient_and_others_a_finite_one(forecaster):
    x = random_rows()
    x[4] = NAN  # refused by `predict`, but a dataset may hold it

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_forecast(x):
        y = forecaster(x)
        return ops.sum(ops.square(y)), y

    gradient, y = gradient_and_forecast(x)
    assert np.isfinite(gradient).all()
    assert (gradient[np.isnan(x)] == 0).all()
    assert (gradient[0, 3:] != 0).any(axis=0).all()
    assert (y[4] == 0).all()


def test_missing_targets_are_no_errors(forecaster):
    x = random_rows()
    y = np.random.default_rng(1).normal(size=(5, 5, 2))
    y[0], y[1, 2, 1] = NAN, NAN
    errors = np.nan_to_num(forecaster.predict(x, verbose=0) - y)
    loss, mae = forecaster.evaluate(x, y, verbose=0)
    assert loss == pytest.approx(np.mean(errors**2), rel=1e-5)
    assert mae == pytest.approx(np.mean(np.abs(errors)), rel=1e-5)

    # A row without any target moves nothing: without it, the sum of gradients is the same. Nor does
    # a missing one where the loss has a kink.
    def pinball(y, y_pred):
        return ops.mean(ops.maximum(0.9 * (y - y_pred), -0.1 * (y - y_pred)), axis=-1)

    model = keras.models.clone_model(forecaster)
    for loss in ("mse", pinball):
        moved = []
        for rows in (slice(0, 5), slice(1, 5)):
            model.set_weights(forecaster.get_weights())
            # SGD on the sum over the rows, which the mean is divided by.
            model.compile(optimizer=keras.optimizers.SGD(1e-2 * len(x[rows])), loss=loss)
            model.train_on_batch(x[rows], y[rows])
            moved.append(model.get_weights())
        for a, b, old in zip(*moved, forecaster.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a - old).max())
            assert np.isfinite(a).all()


def test_validation_data_are_looked_at_first(forecaster):
    x, y = random_rows(), np.zeros((5, 5, 2))
    empty = x.copy()
    empty[3, :, 2] = NAN
    before = forecaster.get_weights()
    for validation, message in (
        ((empty, y), "Row 3"),
        ((x,), "Targets are missing"),
        ((x, y, -np.ones(5)), "not negative"),
    ):
        with pytest.raises(ValueError, match=message):
            forecaster.fit(x, y, validation_data=validation, verbose=0)
    assert all(map(np.array_equal, forecaster.get_weights(), before))


def test_fit_drops_what_dropout_says():
    """The same weights: without steps, only what is dropped can make losses differ."""
    model = keras_mamba2.Mamba2Forecaster(5, 3, **SMALL, dropout=0.5)
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse")
    x, y = random_rows(), np.zeros((5, 5, 3), "float32")
    losses = model.fit(x, y, epochs=2, verbose=0).history["loss"]
    assert abs(losses[1] - losses[0]) > 1e-4
    np.testing.assert_array_equal(model.predict(x, verbose=0), model.predict(x, verbose=0))


def test_a_saved_model_is_the_same(forecaster, tmp_path):
    x = random_rows()
    forecaster.save(tmp_path / "forecaster.keras")
    again = keras.models.load_model(tmp_path / "forecaster.keras")
    assert isinstance(again, keras_mamba2.Mamba2Forecaster)
    assert again.get_config() == forecaster.get_config()
    np.testing.assert_array_equal(again.predict(x, verbose=0), forecaster.predict(x, verbose=0))


@pytest.fixture
def preset(forecaster, tmp_path):
    forecaster.save_to_preset(tmp_path / "preset")
    return tmp_path / "preset"


def test_a_preset_is_the_same_model(forecaster, preset):
    x = random_rows()
    again = keras_mamba2.Mamba2Forecaster.from_preset(preset)
    assert again.get_config() == forecaster.get_config()
    np.testing.assert_array_equal(again.predict(x, verbose=0), forecaster.predict(x, verbose=0))
    again = keras_mamba2.Mamba2Forecaster.from_preset(preset, load_weights=False, dropout=0.1)
    assert again.get_config()["dropout"] == 0.1
    assert not np.array_equal(again.get_weights()[0], forecaster.get_weights()[0])


@pytest.mark.parametrize(
    ("asked", "loaded"),
    [({}, "float32"), ({"dtype": "auto"}, "mixed_bfloat16"), ({"dtype": "float16"}, "float16")],
)
def test_the_dtype_of_a_preset_is_chosen_as_for_other_tasks(tmp_path, asked, loaded):
    keras_mamba2.Mamba2Forecaster(2, dtype="mixed_bfloat16", **SMALL).save_to_preset(tmp_path / "a")
    again = keras_mamba2.Mamba2Forecaster.from_preset(tmp_path / "a", **asked)
    assert again.dtype_policy.name == again.blocks[0].dtype_policy.name == loaded


def test_a_preset_replaces_one_as_a_whole(forecaster, preset):
    (preset / "README.md").write_text("mine")
    forecaster.save_to_preset(preset)
    written = {path.name for path in preset.iterdir()}
    assert written == {"README.md", "config.json", "model.weights.h5"}
    (preset / "thesis.tex").touch()
    with pytest.raises(ValueError, match="thesis.tex.*another folder"):
        forecaster.save_to_preset(preset)


def test_presets_of_others_are_named(preset, preset_folder):
    with pytest.raises(ValueError, match="a Mamba2Forecaster. Received: .*Mamba2Backbone'"):
        keras_mamba2.Mamba2Forecaster.from_preset(preset_folder)
    with pytest.raises(ValueError, match="a Mamba2Backbone or a .*Mamba2Forecaster'"):
        keras_mamba2.Mamba2CausalLM.from_preset(preset)
    (preset / "model.weights.h5").unlink()
    with pytest.raises(ValueError, match="model.weights.h5 is missing"):
        keras_mamba2.Mamba2Forecaster.from_preset(preset)


def test_large_values_survive_small_dtypes():
    model = keras_mamba2.Mamba2Forecaster(2, dtype="mixed_bfloat16", **SMALL)
    x = 1000 + np.sin(np.arange(12, dtype="float32"))[None, :, None]
    y = model.predict(x, verbose=0)
    assert y.dtype == np.float32
    # In bfloat16 the series would be eight steps apart, and never vary.
    assert 0 < np.abs(y - x.mean()).max() < 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 0}, "horizon=0"),
        ({"num_features": 0}, "num_features=0"),
        ({"num_layers": -1}, "num_layers=-1"),
        ({"output_features": 4}, "num_features=3.*Received: 4"),
        ({"output_features": [0, 3]}, "num_features=3.*Received: \\[0, 3\\]"),
        ({"output_features": ()}, "output_features"),
        ({"head_dim": 7}, "head_dim=7"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_mamba2.Mamba2Forecaster(**{"horizon": 5, "num_features": 3, **SMALL, **arguments})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.ones((2, 12, 4)), "num_features = 3.*shape=\\(2, 12, 4\\)"),
        (np.ones((2, 0, 3)), "t > 0.*shape=\\(2, 0, 3\\)"),
        (np.ones((12, 3)), "shape=\\(12, 3\\)"),
        ({"values": np.ones((2, 12, 3)), "mask": np.ones((2, 11))}, "mask.*shape=\\(2, 11\\)"),
        ({"x": np.ones((2, 12, 3))}, "`values` and `mask`.*x"),
    ],
)
def test_bad_inputs_are_named(forecaster, inputs, message):
    for use in (forecaster, forecaster.predict):
        with pytest.raises(ValueError, match=message):
            use(inputs)


def test_rows_without_a_series_are_named(forecaster):
    x = random_rows()
    x[3, :, 2] = NAN
    with pytest.raises(ValueError, match="Row 3 has no observed value of feature 2.*1 in 5"):
        forecaster.predict(x)
    for use in (forecaster.fit, forecaster.evaluate):
        with pytest.raises(ValueError, match="Row 3"):
            use({"values": random_rows(), "mask": np.isfinite(x)}, np.zeros((5, 5, 2)))
    with pytest.raises(ValueError, match=r"\(5, 5, 2\). Received: shape=\(5, 5\)"):
        forecaster.evaluate(random_rows(), np.zeros((5, 5)))


class Batches(keras.utils.PyDataset):
    """The rows in batches of one, and which of them were read."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y, self.read = x, y, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.read.append(i)
        return self.x[i : i + 1], self.y[i : i + 1]


def generated(x, y):
    for i in range(len(x)):
        yield x[i : i + 1], y[i : i + 1]


# Keras says it of every dataset whose length it cannot ask for.
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_batches_are_read_one_by_one(forecaster):
    x, y = random_rows(), np.zeros((5, 5, 2), "float32")
    expected = forecaster.evaluate(x, y, batch_size=1, verbose=0)
    loader = torch.utils.data.DataLoader(list(zip(x, y, strict=True)))
    one_by_one = (lambda: Batches(x, y)), (lambda: generated(x, y)), (lambda: loader)
    for batches in one_by_one:
        np.testing.assert_allclose(forecaster.evaluate(batches(), verbose=0), expected, rtol=1e-5)
    assert forecaster.predict(Batches(x, y), verbose=0).shape == y.shape

    dataset, validation = Batches(x, y), Batches(x, y)
    before = forecaster.get_weights()
    fitted = forecaster.fit(dataset, validation_data=validation, steps_per_epoch=1, verbose=0)
    assert np.isfinite(fitted.history["val_loss"]).all()
    assert len(set(dataset.read)) < 5  # not the whole, to look for its shape
    forecaster.fit(generated(x, y), steps_per_epoch=2, verbose=0)
    forecaster.set_weights(before)


def waves(count, seed):
    """Windows of waves of one period, each with its own unit, phase and gaps; and what follows."""
    rng = np.random.default_rng(seed)
    unit, level = np.exp(rng.normal(size=(2, count, 1, 1)))
    phase = rng.uniform(0, 2 * np.pi, size=(count, 1, 1))
    series = unit * (level + np.sin(phase + 2 * np.pi * np.arange(20)[:, None] / 8))
    series[rng.random(series.shape) < 0.1] = NAN
    return series[:, :16], series[:, 16:], unit


@pytest.mark.slow
def test_it_learns():
    """The next half of a wave, of any unit and phase, from two waves with gaps."""
    keras.utils.set_random_seed(0)
    model = keras_mamba2.Mamba2Forecaster(4, **SMALL)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss="mae")
    x, y, _ = waves(400, seed=1)
    model.fit(x, y, batch_size=40, epochs=12, verbose=0)
    x, y, unit = waves(200, seed=2)
    error = np.nanmean(np.abs(model.predict(x, verbose=0) - y) / unit)
    means = np.nanmean(np.abs(np.nanmean(x, axis=1, keepdims=True) - y) / unit)
    assert error < 0.25 * means
