import json

import keras
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2.training import adamw_recipe


@pytest.mark.parametrize("decay_embeddings", [True, False])
@pytest.mark.parametrize("loaded", [False, True])
def test_weight_decay_is_for_matrices_only(decay_embeddings, loaded):
    backbone = keras_mamba2.Mamba2Backbone(
        33, 2, 16, head_dim=8, state_dim=4, use_bias=True, tie_word_embeddings=False
    )
    optimizer = adamw_recipe(
        0.5, steps=2, warmup_steps=0, weight_decay=0.1, decay_embeddings=decay_embeddings
    )
    if loaded:
        config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
        optimizer = keras.optimizers.deserialize(config)
    optimizer.build(backbone.trainable_variables)
    before = {v.path: v.numpy() for v in backbone.trainable_variables}
    for variable in backbone.trainable_variables:
        variable.assign(np.ones(variable.shape))
    gradients = [np.zeros(v.shape, "float32") for v in backbone.trainable_variables]
    optimizer.apply(gradients)
    decayed = {v.path for v in backbone.trainable_variables if (v.numpy() < 1).all()}
    kept = {v.path for v in backbone.trainable_variables if (v.numpy() == 1).all()}
    assert decayed | kept == set(before)
    matrices = {path for path in before if path.endswith("kernel")}
    embeddings = {path for path in before if "embeddings" in path}
    assert decayed == matrices | (embeddings if decay_embeddings else set())
    last_names = {path.rsplit("/", 1)[1] for path in kept - embeddings}
    assert last_names == {"A_log", "D", "dt_bias", "scale", "bias", "conv_bias"}


def test_the_learning_rate_rises_and_falls():
    schedule = adamw_recipe(1e-3, steps=100, warmup_steps=10)._learning_rate
    rates = [float(schedule(step)) for step in (0, 5, 10, 55, 100, 200)]
    np.testing.assert_allclose(rates, [0, 5e-4, 1e-3, 5.5e-4, 1e-4, 1e-4], rtol=1e-4, atol=1e-9)


def test_a_warm_up_ends_before_the_training():
    with pytest.raises(ValueError, match="warmup_steps=9, steps=9"):
        adamw_recipe(1e-3, steps=9, warmup_steps=9)
