# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Forecast time series with Mamba-2 in Keras
#
# A Mamba-2 block maps any sequence to a sequence, not only text. `Mamba2Forecaster` reads a window
# of several measured features, gaps included, and says how some of them go on. This guide makes
# three years of hourly power demand that look like real ones, trains a small forecaster on them in
# a minute on a laptop, and compares it with the forecasts that everybody has for free: the last
# value, the same hour of yesterday, and the same hour of last week.

# %%
# In Colab this installs the package; elsewhere it does nothing.
import importlib.util
import pathlib
import subprocess
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("keras_mamba2") is None:
    source = ""
    if not source:  # not published yet: from a wheel beside this notebook, or its own repository
        wheels = sorted(map(str, pathlib.Path().glob("keras_mamba2-*.whl")))
        source = wheels[-1] if wheels else ".."
        if not wheels and not pathlib.Path("../pyproject.toml").exists():
            raise FileNotFoundError(
                "keras_mamba2 is not published yet. Make a wheel with `pip wheel --no-deps .` in "
                "its repository, upload it here (Files, on the left), and run this cell again."
            )
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_mamba2

EPOCHS = 10
DAY, WEEK, YEAR = 24, 7 * 24, 365 * 24
CONTEXT, HORIZON = WEEK, DAY

# %% [markdown]
# ## Three years of demand
#
# Temperature has seasons, a daily cycle, and weather that stays for days. Demand grows slowly, has
# a shape of the day, another one at the weekend, and rises with heating when it is cold. Both are
# noisy, and both have gaps: meters fail for some hours, and single readings get lost.

# %%
rng = np.random.default_rng(0)
hours = np.arange(3 * YEAR)


def persistent_noise(deviation: float, memory: float) -> np.ndarray:
    """An autoregression: each value is a fraction `memory` of the one before, and something new."""
    noise = rng.normal(scale=deviation * np.sqrt(1 - memory**2), size=len(hours))
    for i in range(1, len(noise)):
        noise[i] += memory * noise[i - 1]
    return noise


def with_gaps(feature: np.ndarray) -> np.ndarray:
    feature = feature.copy()
    for start in rng.integers(len(feature), size=180):
        feature[start : start + rng.integers(1, 12)] = np.nan
    feature[rng.random(len(feature)) < 0.02] = np.nan
    return feature


angle_of_day, angle_of_year = 2 * np.pi * hours / DAY, 2 * np.pi * hours / YEAR
is_weekend = (hours // DAY) % 7 >= 5
temperature = (
    10 - 9 * np.cos(angle_of_year) - 4 * np.cos(angle_of_day - 0.9) + persistent_noise(3, 0.985)
)
working_day = 5 * np.exp(-((((hours % DAY) - 8.5) / 3) ** 2))
working_day += 7 * np.exp(-((((hours % DAY) - 18.5) / 3.5) ** 2))
demand = (
    50
    + 2 * hours / YEAR
    + np.where(is_weekend, 0.5, 1) * working_day
    - 4 * is_weekend
    - 5 * np.cos(angle_of_day)
    + 0.6 * np.maximum(15 - temperature, 0)
    + persistent_noise(1, 0.9)
    + rng.normal(scale=0.5, size=len(hours))
)

# %% [markdown]
# The forecaster sees both, and the calendar: where in the day and in the week an hour is, each as a
# point on a circle.

# %%
angle_of_week = 2 * np.pi * hours / WEEK
measured = [with_gaps(demand), with_gaps(temperature)]
calendar = [f(angle) for angle in (angle_of_day, angle_of_week) for f in (np.sin, np.cos)]
series = np.stack([*measured, *calendar], axis=1).astype("float32")  # (26280 6)
print(f"missing: {np.isnan(series[:, :2]).mean():.1%} of demand and temperature")

# %% [markdown]
# ## Windows
#
# A week is the input and the day after it the target. The last half year is for testing; no window
# lies on both sides. Strides of 13 and 5 hours have no factor in common with a week, so that
# windows begin at all of its hours. Missing values stay what they are, NaN: the forecaster knows
# them in its inputs, and leaves them out of the loss in its targets.


# %%
def windows(series: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs `(n 168 6)`, and the demand of the day after each, `(n 24 1)`."""
    rows = np.lib.stride_tricks.sliding_window_view(series, CONTEXT + HORIZON, axis=0)[::stride]
    rows = rows.transpose(0, 2, 1).copy()  # (n 192 6)
    return rows[:, :CONTEXT], rows[:, CONTEXT:, :1]


split = len(series) - YEAR // 2
x, y = windows(series[:split], stride=13)
test_x, test_y = windows(series[split:], stride=5)
print(f"{len(x)} windows to train on, {len(test_x)} to test")

# %% [markdown]
# In the years to learn from, hardly a window ends in a long gap. To learn what to do then, every
# other one loses what was measured in its last hours, up to two days of them.

# %%
for row in x[::2]:
    row[-rng.integers(1, 2 * DAY + 1) :, :2] = np.nan

# %% [markdown]
# ## Train
#
# Each window is scaled inside the model by its own mean and deviation, and the forecast is scaled
# back, so nothing has to be normalised here, and a demand in kilowatts would give the same
# forecast. Compiling and fitting is plain Keras.

# %%
keras.utils.set_random_seed(0)
forecaster = keras_mamba2.Mamba2Forecaster(
    horizon=HORIZON,
    num_features=6,
    output_features=1,  # the first
    num_layers=2,
    hidden_dim=32,
    state_dim=16,
    dropout=0.1,
)
batch_size = 32
forecaster.compile(
    optimizer=keras_mamba2.training.adamw_recipe(5e-3, steps=EPOCHS * len(x) // batch_size),
    loss="mae",
)
history = forecaster.fit(x, y, batch_size=batch_size, epochs=EPOCHS, verbose=2)

# %% [markdown]
# ## Compare
#
# The naive forecasts copy from the window. Where the value that they would copy is missing, they
# get the last one known before it at the same hour of the day.


# %%
def filled(demand: np.ndarray) -> np.ndarray:
    """Windows of demand `(n t)`, gaps filled from the day before, at the start from the next."""
    demand = demand.copy()
    for i in [*range(DAY, demand.shape[1]), *range(demand.shape[1] - DAY - 1, -1, -1)]:
        source = demand[:, i - DAY] if i >= DAY else demand[:, i + DAY]
        demand[:, i] = np.where(np.isnan(demand[:, i]), source, demand[:, i])
    return demand


past = filled(test_x[..., 0])
forecasts = {
    "last value": np.repeat(past[:, -1:], HORIZON, axis=1),
    "same hour, yesterday": past[:, -DAY:],
    "same hour, last week": past[:, -WEEK:][:, :HORIZON],
    "Mamba2Forecaster": forecaster.predict(test_x, verbose=0)[..., 0],
}
errors = {name: np.abs(forecast - test_y[..., 0]) for name, forecast in forecasts.items()}
mae = {name: float(np.nanmean(error)) for name, error in errors.items()}

print(f"{'mean absolute error':<22} {'all':>6} {'1 h':>6} {'6 h':>6} {'24 h':>6}")
for name, error in errors.items():
    by_hour = np.nanmean(error, axis=0)
    print(f"{name:<22} {mae[name]:6.2f} {by_hour[0]:6.2f} {by_hour[5]:6.2f} {by_hour[23]:6.2f}")

# %% [markdown]
# How far off it is, hour by hour; and a week of the test, forecast each midnight.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(2, 3))
for name, error in errors.items():
    left.plot(np.arange(1, HORIZON + 1), np.nanmean(error, axis=0), label=name)
left.set(xlabel="hours ahead", ylabel="mean absolute error", ylim=(0, None))
left.legend(fontsize="small")

midnight = -(-split // DAY) * DAY
days_x, days_y = windows(series[midnight : midnight + CONTEXT + WEEK], stride=DAY)  # 7 of them
right.plot(days_y.ravel(), "k", linewidth=1, label="measured")
right.plot(forecaster.predict(days_x, verbose=0).ravel(), "C3", label="forecast")
right.set(xlabel="hours", ylabel="demand")
right.legend(fontsize="small")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Gaps
#
# What was measured last is taken away from all test windows. The forecaster is told that it is
# missing, and falls back on the days before and on the calendar.

# %%
without = {}
for lost in (0, 3, 12, 48):
    gappy = test_x.copy()
    gappy[:, CONTEXT - lost :, :2] = np.nan
    error = np.abs(forecaster.predict(gappy, verbose=0) - test_y)
    without[lost] = float(np.nanmean(error))
    print(f"without the last {lost:>2} hours: {without[lost]:.2f}")

# %% [markdown]
# `forecaster.save_to_preset("demand")` writes the forecaster into a folder, and
# `keras_mamba2.Mamba2Forecaster.from_preset("demand")` loads it again, also from the Hugging Face
# hub. It is a Keras model too: `forecaster.save("demand.keras")` and `keras.models.load_model` do
# the same with one file.
