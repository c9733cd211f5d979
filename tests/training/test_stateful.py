"""A stream in windows, the state carried: the loss of the whole, gradients up to the cut."""

import jax
import keras
import numpy as np
import pytest
from keras import ops

from keras_mamba2 import Mamba2Backbone
from keras_mamba2 import Mamba2CausalLM
from keras_mamba2 import Mamba2HybridBackbone
from keras_mamba2._compat.keras_training import batches_trained
from keras_mamba2.training import ConsecutiveWindows
from keras_mamba2.training import StatefulTraining
from tests import reference

TOKEN_IDS = np.random.default_rng(0).integers(20, size=3 * 32 + 1)
EPS = np.finfo("float32").eps


def make_lm(**changes):
    keras.utils.set_random_seed(0)
    sizes = {"state_dim": 4, "head_dim": 4, "num_groups": 2, "chunk_size": 4}
    return Mamba2CausalLM(Mamba2Backbone(20, 2, 8, **sizes | changes))


@pytest.fixture(scope="module")
def training():
    lm = make_lm()
    reference.randomize(lm)
    training = StatefulTraining(lm, batch_size=3)
    training.compile(keras.optimizers.SGD(0.1))
    return training


@pytest.mark.parametrize(("batch_size", "window"), [(1, 96), (3, 8), (3, 5), (2, 7)])
def test_windows_follow_one_another(batch_size, window):
    windows = ConsecutiveWindows(TOKEN_IDS, batch_size, window)
    batches = [windows[i] for i in range(len(windows))]
    assert len(windows) == 96 // batch_size // window
    for row in range(batch_size):
        start = 96 // batch_size * row
        inputs = np.concatenate([x["token_ids"][row] for x, _ in batches])
        targets = np.concatenate([y[row] for _, y in batches])
        np.testing.assert_array_equal(inputs, TOKEN_IDS[start:][: len(inputs)])
        np.testing.assert_array_equal(targets, TOKEN_IDS[start + 1 :][: len(inputs)])


def test_the_loss_of_windows_is_that_of_the_whole(training):
    losses = [
        training.evaluate(ConsecutiveWindows(TOKEN_IDS, 3, window), verbose=0)
        for window in (32, 16, 4)
    ]
    np.testing.assert_allclose(losses[1:], losses[0], rtol=32 * EPS)
    alone = make_lm()
    alone.set_weights(training.lm.get_weights())
    alone.compile(weighted_metrics=[])
    x, y = ConsecutiveWindows(TOKEN_IDS, 3, 32)[0]
    np.testing.assert_allclose(losses[0], alone.evaluate(x, y, verbose=0), rtol=32 * EPS)


def test_gradients_flow_through_a_state_that_is_passed_on(training):
    """What `StatefulTraining` cuts off: two windows in one step are the joined window."""
    lm = training.lm
    x, y = ConsecutiveWindows(TOKEN_IDS, 3, 32)[0]
    variables = lm.trainable_variables

    def gradients(*cuts):
        def loss(values):
            with keras.StatelessScope(list(zip(variables, values, strict=True))):
                state, parts = None, []
                for start, end in zip((0, *cuts), (*cuts, 32), strict=True):
                    part, state = lm.backbone.call_with_state(x["token_ids"][:, start:end], state)
                    parts.append(part)
                logits = lm.backbone.token_embedding(ops.concatenate(parts, axis=1), reverse=True)
            return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, logits)

        return jax.jit(jax.grad(loss))([variable.value for variable in variables])

    for whole, joined in zip(gradients(), gradients(5, 19), strict=True):
        np.testing.assert_allclose(joined, whole, 0, 256 * EPS * np.abs(whole).max())


def test_training_starts_each_epoch_and_evaluation_anew(training):
    windows = ConsecutiveWindows(TOKEN_IDS, 3, 8)
    before = training.evaluate(windows, verbose=0)
    training.optimizer.learning_rate = 0.0
    history = training.fit(windows, epochs=2, validation_data=windows, verbose=0).history
    np.testing.assert_allclose(history["loss"] + history["val_loss"], before, rtol=8 * EPS)
    training.optimizer.learning_rate = 0.1
    stop = keras.callbacks.TerminateOnNaN()  # one callback, not in a list
    history = training.fit(windows, epochs=3, verbose=0, callbacks=stop).history
    assert history["loss"][-1] < history["loss"][0]
    assert training.evaluate(windows, verbose=0) < before


def test_a_prediction_begins_with_the_text(training):
    windows = ConsecutiveWindows(TOKEN_IDS, 3, 8)
    found = training.predict(windows, verbose=0)
    np.testing.assert_array_equal(found, training.predict(windows, verbose=0))
    training.evaluate(windows, verbose=0)
    np.testing.assert_array_equal(found, training.predict(windows, verbose=0))


@pytest.mark.slow
def test_dropout_and_remat_are_those_of_training():
    losses = []
    for changes in ({}, {"remat": True}, {"dropout": 0.5}, {"dropout": 0.5, "remat": True}):
        training = StatefulTraining(make_lm(**changes), batch_size=3)
        training.compile(keras.optimizers.SGD(0.1))
        history = training.fit(ConsecutiveWindows(TOKEN_IDS, 3, 16), epochs=2, verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=16 * EPS)
    np.testing.assert_allclose(losses[3], losses[2], rtol=16 * EPS)


def test_dropout_drops_in_training_only():
    """The same weights: without steps, only what is dropped can make losses differ."""
    training = StatefulTraining(make_lm(dropout=0.5), batch_size=3)
    training.compile(keras.optimizers.SGD(0.0))
    windows = ConsecutiveWindows(TOKEN_IDS, 3, 16)
    losses = training.fit(windows, epochs=2, verbose=0).history["loss"]
    assert abs(losses[1] - losses[0]) > 1e-4
    evaluated = [training.evaluate(windows, verbose=0) for _ in range(2)]
    assert evaluated[0] == evaluated[1]


def test_float16_has_its_loss_scaled():
    """As in `lm.fit`: without it, gradients below 6e-8 would be zero."""
    windows = ConsecutiveWindows(TOKEN_IDS, 3, 16)
    scaled = keras.optimizers.LossScaleOptimizer
    for dtype in ("mixed_float16", "float32"):
        lm = make_lm(dtype=dtype)
        training = StatefulTraining(lm, batch_size=3)
        for auto_scale_loss in (True, False):
            lm.compile("sgd", auto_scale_loss=auto_scale_loss)
            training.compile("sgd", auto_scale_loss=auto_scale_loss)
            assert isinstance(training.optimizer, scaled) == isinstance(lm.optimizer, scaled)
            assert isinstance(lm.optimizer, scaled) == (auto_scale_loss and "mixed" in dtype)
    training = StatefulTraining(make_lm(dtype="mixed_float16"), batch_size=3)
    training.compile(scaled(keras.optimizers.SGD(0.1), initial_scale=1024.0))
    assert not isinstance(training.optimizer.inner_optimizer, scaled)
    losses = training.fit(windows, epochs=2, verbose=0).history["loss"]
    assert losses[1] < losses[0]
    assert batches_trained(training.optimizer) == 2 * len(windows)


def test_a_model_with_attention_is_refused():
    attention = {"num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    backbone = Mamba2HybridBackbone(20, 8, ["attention"], {"attention": attention})
    with pytest.raises(ValueError, match="Attention keeps something of every token"):
        StatefulTraining(Mamba2CausalLM(backbone), batch_size=2)


def test_bad_input_is_refused(training):
    with pytest.raises(ValueError, match="more than batch_size \\* window = 100 tokens.*\\(97,\\)"):
        ConsecutiveWindows(TOKEN_IDS, 5, 20)
    with pytest.raises(ValueError, match="one row.*\\(1, 97\\)"):
        ConsecutiveWindows(TOKEN_IDS[None], 1, 4)
    with pytest.raises(ValueError, match="`window` must be a positive integer.*window=0"):
        ConsecutiveWindows(TOKEN_IDS, 1, 0)
    x, _ = ConsecutiveWindows(TOKEN_IDS, 2, 4)[0]
    with pytest.raises(ValueError, match="Every batch must have batch_size=3 rows.*\\(2, 4\\)"):
        training(x)
