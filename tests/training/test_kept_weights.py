"""Data that cannot be read end a training with an error, and not with a model without weights."""

import grain
import keras
import numpy as np
import pytest

import keras_mamba2

ROWS = np.arange(40, dtype="float32").reshape(8, 5, 1)


class Interrupted(Exception):
    pass


def batches(fails_in, epochs=1):
    """Batches of windows and targets, of which one cannot be read."""

    def read(i):
        if i == fails_in:
            raise Interrupted
        return ROWS[i % 8], ROWS[i % 8, :1]

    return grain.MapDataset.range(8 * epochs).map(read).batch(2)


@pytest.fixture(scope="module")
def forecaster():
    forecaster = keras_mamba2.Mamba2Forecaster(1, hidden_dim=8, state_dim=4, head_dim=4)
    forecaster.compile(optimizer=keras.optimizers.Adam(0.1), loss="mse")
    forecaster.fit(ROWS, ROWS[:, :1], verbose=0)
    return forecaster


@pytest.mark.parametrize("fails_in", [0, 7])
@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_weights_are_there_after_an_error(forecaster, method, fails_in):
    weights = [np.array(weight) for weight in forecaster.get_weights()]
    with pytest.raises(Interrupted):
        getattr(forecaster, method)(batches(fails_in), verbose=0)
    found = forecaster.get_weights()
    if method != "fit" or fails_in == 0:
        for old, new in zip(weights, found, strict=True):
            np.testing.assert_array_equal(old, new)
    assert all(np.isfinite(weight).all() for weight in found)


def test_weights_are_those_of_the_epoch_before(forecaster):
    before = int(forecaster.optimizer.iterations)
    with pytest.raises(Interrupted):
        forecaster.fit(batches(8, epochs=2), epochs=2, steps_per_epoch=4, verbose=0)
    assert forecaster.optimizer.iterations == before + 4
    forecaster.fit(ROWS, ROWS[:, :1], verbose=0)
