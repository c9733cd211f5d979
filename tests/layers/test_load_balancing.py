"""The loss that keeps all experts in use."""

import keras
import numpy as np
import pytest
import torch
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import load_balancing_loss_func

import keras_mamba2
from keras_mamba2.layers import MixtureOfExperts
from tests import reference

EXPERTS = {"intermediate_dim": 7, "num_experts": 6, "num_experts_per_token": 2}


def layer_of(**arguments):
    layer = MixtureOfExperts(12, **EXPERTS, load_balancing_loss=0.5, **arguments)
    layer.build((None, None, 12))
    reference.randomize(layer)
    return layer


def test_it_is_that_of_transformers():
    layer = layer_of()
    x = np.random.default_rng(0).normal(size=(3, 5, 12)).astype("float32")
    mask = np.arange(5) < np.array([[5], [3], [1]])
    logits = torch.from_numpy(x.reshape(-1, 12) @ np.asarray(layer.router))
    for real in (None, mask):
        layer(x, mask=real, training=True)
        [found] = layer.losses
        attention_mask = None if real is None else torch.from_numpy(real)
        expected = load_balancing_loss_func((logits,), 6, 2, attention_mask)
        np.testing.assert_allclose(found, 0.5 * float(expected), rtol=1e-5)
    layer(x)
    assert not layer.losses, "only training adds it"


def test_equal_use_costs_least():
    layer = layer_of(scoring="sigmoid")
    x = np.random.default_rng(0).normal(size=(1, 600, 12)).astype("float32")
    layer.router.assign(np.zeros((12, 6)))
    layer.router_bias.assign([9, 9, 0, 0, 0, 0])
    layer(x, training=True)
    assert layer.losses[0] == pytest.approx(0.5 * 2)  # probabilities are equal
    layer.router.assign(np.outer(np.ones(12), [9, 8, 0, 0, 0, 0]))
    layer(np.abs(x), training=True)
    assert layer.losses[0] > 1.3


def model_of(load_balancing_loss, **arguments):
    keras.utils.set_random_seed(0)
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=16,
        hidden_dim=12,
        blocks=["mixture_of_experts", "mixture_of_experts"],
        sublayers={"mixture_of_experts": {**EXPERTS, "load_balancing_loss": load_balancing_loss}},
        **arguments,
    )
    lm = keras_mamba2.Mamba2CausalLM(backbone)
    lm.compile(optimizer=keras.optimizers.SGD(0.0), weighted_metrics=[])
    return lm


def test_fit_adds_that_of_every_layer():
    ids = np.random.default_rng(0).integers(16, size=(4, 9)).astype("int32")
    inputs = {"token_ids": ids[:, :-1], "padding_mask": np.ones((4, 8), "int32")}
    losses = []
    for factor in (0.0, 0.01, 1.0):
        lm = model_of(factor)
        losses.append(lm.fit(inputs, ids[:, 1:], verbose=0).history["loss"][0])
    small, large = losses[1] - losses[0], losses[2] - losses[0]
    assert 100 * small == pytest.approx(large, rel=1e-3)
    assert large >= 2 * 2 * 0.99  # two layers of two experts a token


def test_training_with_states_adds_the_same():
    ids = np.random.default_rng(0).integers(16, size=(2, 9)).astype("int32")
    inputs = {"token_ids": ids, "padding_mask": np.arange(9) < np.array([[9], [4]])}
    lm = model_of(0.5)
    training = keras_mamba2.training.StatefulTraining(lm, batch_size=2)
    losses = []
    for model in (lm, training):
        model(inputs, training=True)
        losses.append([float(loss) for loss in model.losses])
    assert len(losses[0]) == 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_remat_would_lose_it():
    with pytest.raises(ValueError, match="`remat=False`, or `load_balancing_loss=0`"):
        model_of(0.1, remat=True)


@pytest.mark.parametrize("value", [-1, "a", None, float("nan")])
def test_another_value_is_refused(value):
    with pytest.raises(ValueError, match="load_balancing_loss"):
        model_of(value)
