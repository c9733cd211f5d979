import keras
import numpy as np
import pytest
from keras import ops
from keras_hub.src.tests.test_case import TestCase

from keras_mamba2.layers import GatedRMSNormalization
from tests import reference

EPS = np.finfo(np.float32).eps


def random_inputs(shape=(2, 5, 12)):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype("float32") for _ in range(2)]


def random_layer(**arguments):
    layer = GatedRMSNormalization(**arguments)
    layer.build((None, None, 12))
    reference.randomize(layer)
    return layer


class GatedRMSNormalizationTest(TestCase):
    def test_layer_with_gate(self):
        x, gate = random_inputs()
        self.run_layer_test(
            GatedRMSNormalization,
            init_kwargs={"num_groups": 3, "epsilon": 1e-6},
            input_data={"x": ops.convert_to_tensor(x), "gate": ops.convert_to_tensor(gate)},
            expected_output_shape=(2, 5, 12),
            expected_num_trainable_weights=1,
        )

    def test_layer_without_gate(self):
        self.run_layer_test(
            GatedRMSNormalization,
            init_kwargs={},
            input_data=ops.convert_to_tensor(random_inputs()[0]),
            expected_output_shape=(2, 5, 12),
            expected_num_trainable_weights=1,
        )


@pytest.mark.parametrize("num_groups", [1, 3, 12])
@pytest.mark.parametrize("gated", [True, False])
def test_is_the_reference(num_groups, gated):
    layer = random_layer(num_groups=num_groups, epsilon=1e-3)
    x, gate = random_inputs()
    gate = gate if gated else None
    (scale,) = reference.weights_of(layer).values()
    truth = reference.gated_rms_normalization(x, scale, gate, num_groups, epsilon=1e-3)
    y = ops.convert_to_numpy(layer(x, gate))
    # Six roundings after one another, of which silu is two or three wide.
    np.testing.assert_allclose(y, truth, rtol=8 * EPS, atol=0)


def test_each_group_is_normalised_on_its_own():
    layer = random_layer(num_groups=3)
    x, gate = random_inputs()
    before = ops.convert_to_numpy(layer(x, gate))
    x[..., 4:8] *= 1000
    after = ops.convert_to_numpy(layer(x, gate))
    np.testing.assert_array_equal(after[..., :4], before[..., :4])
    np.testing.assert_array_equal(after[..., 8:], before[..., 8:])
    assert np.all(after[..., 4:8] != before[..., 4:8])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_a_float32_input_is_rounded_once_at_the_end(policy):
    layer = random_layer(num_groups=3, dtype=policy)
    x, gate = random_inputs()
    (scale,) = reference.weights_of(layer).values()
    y = layer(x, gate)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    truth = reference.gated_rms_normalization(x, scale, gate, num_groups=3)
    y = ops.convert_to_numpy(ops.cast(y, "float32"))
    # Half a unit in bfloat16's last place, and as before what float32 adds.
    np.testing.assert_allclose(y, truth, rtol=2.0**-8 + 8 * EPS, atol=0)


def test_a_row_of_zeros_has_finite_output_and_gradient():
    layer = random_layer(num_groups=3)
    zeros = np.zeros((1, 1, 12), "float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(zeros, zeros)), zeros)
    if keras.config.backend() == "jax":
        import jax

        gradients = jax.grad(lambda x, gate: layer(x, gate).sum(), argnums=(0, 1))(zeros, zeros)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_groups_that_do_not_divide_the_input_are_refused():
    with pytest.raises(ValueError, match=r"`num_groups` must divide.*num_groups=5.*\(2, 5, 12\)"):
        GatedRMSNormalization(num_groups=5)(random_inputs()[0])
