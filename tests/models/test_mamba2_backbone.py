import keras
import numpy as np
import pytest
from keras import ops
from keras_hub.src.tests.test_case import TestCase

from keras_mamba2 import Mamba2Backbone

INIT_KWARGS = {
    "vocabulary_size": 20,
    "num_layers": 2,
    "hidden_dim": 16,
    "state_dim": 4,
    "head_dim": 8,
    "num_groups": 2,
    "chunk_size": 4,
}


class Mamba2BackboneTest(TestCase):
    def setUp(self):
        self.input_data = {
            "token_ids": np.arange(14).reshape(2, 7),
            "padding_mask": np.ones((2, 7), "int32"),
        }

    def test_backbone_basics(self):
        self.run_backbone_test(
            cls=Mamba2Backbone,
            init_kwargs=INIT_KWARGS,
            input_data=self.input_data,
            expected_output_shape=(2, 7, 16),
            # Ours are float32 under every policy, which the harness allows for none: see below.
            run_mixed_precision_check=False,
        )

    def test_saved_model(self):
        self.run_model_saving_test(
            cls=Mamba2Backbone, init_kwargs=INIT_KWARGS, input_data=self.input_data
        )

    def test_the_recurrence_is_float32_under_every_policy(self):
        for policy in ("mixed_bfloat16", "mixed_float16", "bfloat16"):
            policy = keras.DTypePolicy(policy)
            backbone = Mamba2Backbone(**INIT_KWARGS, dtype=policy)
            output = backbone(self.input_data)
            self.assertDTypeEqual(output, policy.compute_dtype)
            for weight in backbone.weights:
                recurrent = weight.name in ("A_log", "dt_bias", "D")
                self.assertDTypeEqual(weight, "float32" if recurrent else policy.variable_dtype)
            _, state = backbone.call_with_state(self.input_data["token_ids"])
            self.assertDTypeEqual(state.layers[0].ssm, "float32")
            self.assertDTypeEqual(state.layers[0].conv, policy.compute_dtype)


def test_initialisation_is_the_paper_s():
    keras.utils.set_random_seed(0)
    backbone = Mamba2Backbone(20, 16, 64, head_dim=2)
    A = np.exp([ops.convert_to_numpy(b.mixer.A_log) for b in backbone.blocks])
    assert 1 <= A.min() < 1.5
    assert 15.5 < A.max() <= 16
    bias = np.array([ops.convert_to_numpy(b.mixer.dt_bias) for b in backbone.blocks], "float64")
    log_dt = np.log(np.log1p(np.exp(bias)))  # softplus, then the logarithm it is uniform in
    low, high = np.log([0.001, 0.1])
    assert low - 1e-3 <= log_dt.min() < low + 0.05
    assert high - 0.05 < log_dt.max() <= high + 1e-3
    np.testing.assert_allclose(np.mean(log_dt), (low + high) / 2, atol=0.15)
    mixer = backbone.blocks[0].mixer
    assert np.abs(ops.convert_to_numpy(mixer.in_proj.kernel)).max() <= 64**-0.5
    largest = np.abs(ops.convert_to_numpy(mixer.out_proj.kernel)).max()
    assert 0.9 < largest * (128 * 16) ** 0.5 <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 7}, "head_dim=7.*hidden_dim=16, so inner size 32"),
        ({"num_groups": 3}, "num_groups=3, number of heads 4"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocabulary_size": -1}, "vocabulary_size=-1"),
        ({"state_dim": 0}, "state_dim.*0"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Backbone(**{**INIT_KWARGS, **arguments})


def test_lora_trains_the_projections_alone():
    backbone = Mamba2Backbone(**INIT_KWARGS)
    backbone.enable_lora(2)
    names = {v.path.split("/")[-2] for v in backbone.trainable_variables}
    assert names == {"in_proj", "out_proj"}
    assert len(backbone.trainable_variables) == 2 * 2 * INIT_KWARGS["num_layers"]
