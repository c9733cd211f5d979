"""Arguments of what trains: named, before any work is done."""

import numpy as np
import pytest

import keras_mamba2
from keras_mamba2.training import ConsecutiveWindows
from keras_mamba2.training import SeedByEpoch
from keras_mamba2.training import StatefulTraining
from keras_mamba2.training import adamw_recipe
from tests import bad_values
from tests.bad_values import INF
from tests.bad_values import NAN
from tests.bad_values import NO_BOOLEAN
from tests.bad_values import NO_INTEGER
from tests.bad_values import NO_NUMBER
from tests.bad_values import NO_RATE
from tests.bad_values import NO_SIZE
from tests.bad_values import named

IDS = np.arange(100) % 50


@named(
    {
        "learning_rate": [*NO_NUMBER, -1],
        "steps": NO_SIZE,
        "warmup_steps": [*NO_INTEGER, -1, 10, 11],
        "final_fraction": [*NO_NUMBER, -0.1],
        "weight_decay": [*NO_NUMBER, -0.1],
        "decay_embeddings": NO_BOOLEAN,
        "beta_2": NO_RATE,
        "global_clipnorm": [NAN, INF, 0, -1, "1", True],
        "beta_1": [NAN, INF],
        "epsilon": [NAN],
    }
)
def test_of_a_recipe(name, value):
    arguments = {"learning_rate": 1e-3, "steps": 10, name: value}
    bad_values.assert_argument_refused(adamw_recipe, name, **arguments)


def test_unknown_keywords_of_a_recipe():
    match = "`AdamW` has no argument `beta_3`. Did you mean 'beta_1'|'beta_2'"
    bad_values.assert_refused(adamw_recipe, 1e-3, 10, beta_3=0.9, match=match)


@named(
    {
        "token_ids": [
            IDS * NAN,
            IDS + 0.5,
            IDS - 1,
            IDS + 2**31,
            IDS.astype(str),
            IDS[None],
            IDS[:16],
            "text",
            None,
            [],
            [[1, 2], [3]],
            3,
        ],
        "batch_size": NO_SIZE,
        "window": [*NO_SIZE, 1000],
    }
)
def test_of_windows(name, value):
    arguments = {"token_ids": IDS, "batch_size": 2, "window": 8, name: value}
    bad_values.assert_refused(
        ConsecutiveWindows, **arguments, match="`token_ids` must be|`window`|`b"
    )


def test_whole_numbers_are_ids():
    windows = ConsecutiveWindows(IDS.astype("float64"), 2, 8)
    assert windows[0][0]["token_ids"].dtype == "int32"


def test_unknown_keywords(lm):
    match = "`ConsecutiveWindows` has no argument `windw`. Did you mean 'window'"
    bad_values.assert_refused(ConsecutiveWindows, IDS, 2, 8, windw=3, match=match)
    match = "`StatefulTraining` has no argument `batchsize`. Did you mean 'batch_size'"
    bad_values.assert_refused(StatefulTraining, lm, 2, batchsize=3, match=match)


@pytest.fixture(scope="module")
def lm():
    backbone = keras_mamba2.Mamba2Backbone(50, 1, 8, state_dim=4, head_dim=4)
    return keras_mamba2.Mamba2CausalLM(backbone)


@named({"lm": [None, "x", 3], "batch_size": NO_SIZE})
def test_of_stateful_training(lm, name, value):
    arguments = {"lm": lm, "batch_size": 2, name: value}
    bad_values.assert_argument_refused(StatefulTraining, name, **arguments)


def test_windows_of_another_vocabulary(lm):
    training = StatefulTraining(lm, 2)
    training.compile("sgd")
    windows = ConsecutiveWindows(IDS + 1, 2, 8)
    for call in (training.fit, training.evaluate):
        match = "`token_ids` must be below num_tokens=50. Received: 50"
        bad_values.assert_refused(call, windows, verbose=0, match=match)


@pytest.mark.parametrize("seed", [*NO_INTEGER, None, -1], ids=repr)
def test_of_a_seed(seed):
    bad_values.assert_argument_refused(SeedByEpoch, "seed", seed=seed)
