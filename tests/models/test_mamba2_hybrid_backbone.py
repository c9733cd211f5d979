import jax
import keras
import numpy as np
import pytest
from keras import ops
from keras import tree
from keras_hub.src.tests.test_case import TestCase

from keras_mamba2 import Mamba2CausalLM
from keras_mamba2 import Mamba2HybridBackbone
from tests import reference

ATTENTION = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
INIT_KWARGS = {
    "vocabulary_size": 20,
    "hidden_dim": 16,
    "blocks": ["mamba2", "mlp", "mamba2+attention", "experts+mlp", *["shared>mamba2"] * 2],
    "sublayers": {
        "mamba2": {"state_dim": 4, "head_dim": 8, "num_groups": 2, "chunk_size": 4},
        "attention": {**ATTENTION, "rotary_dim": 2, "input_multiplier": 1.5},
        "mlp": {"intermediate_dim": 24, "output_multiplier": 0.5},
        "experts": {
            "kind": "mixture_of_experts",
            "intermediate_dim": 8,
            "num_experts": 4,
            "num_experts_per_token": 2,
        },
        "shared": {
            "kind": "shared_transformer",
            "attention": {**ATTENTION, "adapter_rank": 2},
            "mlp": {"intermediate_dim": 24, "activation": "gelu"},
        },
    },
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_multiplier": 0.25,
}


@pytest.fixture(scope="module")
def backbone():
    backbone = Mamba2HybridBackbone(**INIT_KWARGS)
    reference.randomize(backbone)
    return backbone


class Mamba2HybridBackboneTest(TestCase):
    def setUp(self):
        self.input_data = {
            "token_ids": np.arange(14).reshape(2, 7),
            "padding_mask": np.ones((2, 7), "int32"),
        }

    @pytest.mark.slow
    def test_backbone_basics(self):
        self.run_backbone_test(
            cls=Mamba2HybridBackbone,
            init_kwargs=INIT_KWARGS,
            input_data=self.input_data,
            expected_output_shape=(2, 7, 16),
            # As of `Mamba2Backbone`: parts are float32 under every policy.
            run_mixed_precision_check=False,
            run_quantization_check=False,
        )

    def test_saved_model(self):
        self.run_model_saving_test(
            cls=Mamba2HybridBackbone, init_kwargs=INIT_KWARGS, input_data=self.input_data
        )


def test_blocks_of_one_name_share_a_transformer(backbone):
    first, second = (block.feeder for block in backbone.blocks[-2:])
    assert first.attention.query is second.attention.query
    assert first.mlp.down is second.mlp.down
    assert first.norm is second.norm
    assert first.linear is not second.linear
    assert first.attention.adapters[0] is not second.attention.adapters[0]
    assert len(backbone.weights) == len({id(weight) for weight in backbone.weights})


@pytest.mark.slow
def test_the_state_law(backbone):
    ids = np.random.default_rng(0).integers(20, size=(2, 11))
    whole, after = jax.jit(backbone.call_with_state)(ids, backbone.initial_state(2, 11))
    called = jax.jit(backbone.__call__)({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    step = jax.jit(backbone.step)
    y, state = backbone.call_with_state(ids[:, :4], backbone.initial_state(2, 11))
    found = [y]
    for i in range(4, 11):
        y, state = step(ids[:, i], state)
        found.append(y[:, None])
    scale = 256 * np.finfo("float32").eps * np.abs(whole).max()
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=0, atol=scale)
    np.testing.assert_allclose(called, whole, rtol=0, atol=scale)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_multipliers_are_where_they_belong(backbone):
    """Twice as large embeddings and half the multiplier are one model, and so for the logits."""
    ids = np.arange(6)[None]
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    other = Mamba2HybridBackbone(**{**INIT_KWARGS, "embedding_multiplier": 1.5})
    for ours, theirs in zip(backbone.weights, other.weights, strict=True):
        theirs.assign(ours)
    other.token_embedding.embeddings.assign(2 * backbone.token_embedding.embeddings)
    x, y = backbone(inputs), other(inputs)
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(x).max())
    np.testing.assert_allclose(
        backbone.logits(x), 0.25 * backbone.token_embedding(x, reverse=True), rtol=1e-6
    )


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.slow
def test_gradients_reach_every_weight(remat):
    backbone = Mamba2HybridBackbone(**INIT_KWARGS, remat=remat)
    reference.randomize(backbone)
    ids = np.random.default_rng(0).integers(20, size=(2, 9))
    variables = backbone.trainable_variables

    @jax.jit
    def gradients(values):
        def loss(values):
            with keras.StatelessScope(list(zip(variables, values, strict=True))):
                x = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
                return (backbone.logits(x) ** 2).sum()

        return jax.grad(loss)(values)

    for variable, gradient in zip(variables, gradients([v.value for v in variables]), strict=True):
        assert np.isfinite(gradient).all(), variable.path
        assert np.abs(gradient).max() > 0, variable.path


def test_a_state_of_other_layers_is_refused(backbone, tmp_path):
    other = Mamba2HybridBackbone(
        **{**INIT_KWARGS, "blocks": ["mamba2", "attention", *INIT_KWARGS["blocks"][2:]]}
    )
    _, state = other.call_with_state(np.arange(4)[None])
    with pytest.raises(ValueError, match="belongs to another model"):
        state.save(tmp_path / "state", backbone)


@pytest.mark.slow
def test_what_a_file_of_a_state_holds_does_not_depend_on_the_room(backbone, tmp_path):
    ids = np.arange(5)[None]
    sizes = []
    for room in (5, 64):
        _, state = backbone.call_with_state(ids, backbone.initial_state(1, room))
        state.save(tmp_path / "state", backbone)
        sizes.append((tmp_path / "state").stat().st_size)
        again = type(state).load(tmp_path / "state", backbone)
        np.testing.assert_array_equal(again.length, [5])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": []}, "`blocks` is empty"),
        ({"blocks": ["mamba2", "lstm"]}, "Block 1 has a sublayer 'lstm'.*Described: 'mamba2'"),
        ({"blocks": ["mamba2>mlp"]}, "'shared_transformer', and nothing else.*'mamba2>mlp'"),
        ({"blocks": ["shared"]}, "'shared_transformer', and nothing else.*'shared'"),
        ({"blocks": ["shared>shared>mlp"]}, "'shared>shared>mlp'"),
        ({"blocks": ["mlp+mlp"]}, r"only once in a block.*another name.*blocks\[0\]='mlp\+mlp'"),
        ({"sublayers": {"x": {"kind": "lstm"}}, "blocks": ["x"]}, "no sublayer of kind 'lstm'"),
        (
            {
                "sublayers": {"shared_transformer": {"output_multiplier": 2.0}, "mlp": {}},
                "blocks": ["shared_transformer>mlp"],
            },
            "'shared_transformer' has no 'output_multiplier'",
        ),
        ({"vocabulary_size": 0}, "vocabulary_size=0"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Mamba2HybridBackbone(**{**INIT_KWARGS, **changes})


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [("attention", "key_value_dtype", "int8"), ("mamba2", "state_dtype", "bfloat16")],
)
@pytest.mark.parametrize("of_all", [False, True])
def test_kept_dtypes_survive_the_configuration(kind, name, dtype, of_all):
    """Of layers that differ too, each its own."""
    arguments = {"kind": kind, **INIT_KWARGS["sublayers"][kind]}
    sublayers = {"a": {**arguments, name: dtype}, "b": arguments}
    backbone = Mamba2HybridBackbone(
        20, 16, ["a", "b"], sublayers, **{name: dtype if of_all else None}
    )
    again = Mamba2HybridBackbone.from_config(backbone.get_config())
    for model in (backbone, again):
        found = [getattr(block.sublayer.sublayers[0], name) for block in model.blocks]
        assert found == [dtype, dtype if of_all else None]


@pytest.mark.slow
def test_dtypes_under_low_precision():
    backbone = Mamba2HybridBackbone(**INIT_KWARGS, dtype="bfloat16")
    ids = np.arange(6)[None]
    x, state = backbone.call_with_state(ids)
    assert keras.backend.standardize_dtype(x.dtype) == "bfloat16"
    specs = backbone.state_spec()
    for spec, leaf in zip(jax.tree.leaves(specs), jax.tree.leaves(list(state.layers)), strict=True):
        assert keras.backend.standardize_dtype(leaf.dtype) == spec.dtype
    recurrent = {w.name for w in backbone.weights if w.dtype == "float32"}
    assert recurrent == {"A_log", "dt_bias", "D"}
    assert np.isfinite(ops.convert_to_numpy(ops.cast(x, "float32"))).all()


def test_attention_with_policies_of_its_own_keeps_its_state_in_one_dtype():
    policies = keras.dtype_policies.DTypePolicyMap(
        "bfloat16", {".*/query": keras.DTypePolicy("float32")}
    )
    backbone = Mamba2HybridBackbone(
        vocabulary_size=64,
        hidden_dim=16,
        blocks=["attention"],
        sublayers={"attention": {**ATTENTION, "conv_kernel_size": 4}},
        dtype=policies,
    )
    lm = Mamba2CausalLM(backbone, preprocessor=None)
    ids = np.arange(1, 12)[None]
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    state = lm.prefill(inputs)
    kinds = zip(tree.flatten(state.layers), tree.flatten(backbone.state_spec()), strict=True)
    assert all(leaf.dtype == spec.dtype for leaf, spec in kinds)
    found = lm.generate(inputs, max_new_tokens=3, stop_token_ids=None)
    assert found["padding_mask"].sum() == 14


def test_a_state_whose_room_no_file_could_tell_is_not_saved(tmp_path):
    backbone = Mamba2HybridBackbone(
        vocabulary_size=64,
        hidden_dim=16,
        blocks=["attention"],
        sublayers={"attention": ATTENTION},
    )
    ids = np.ones((1, 200), "int32")
    _, state = backbone.call_with_state(ids)
    numbers = np.repeat([[0, 1]], [180, 20], axis=1)
    _, state = backbone.call_with_state(ids, state, segment_ids=numbers)
    with pytest.raises(ValueError, match="keys and values of 256 tokens, and a row of 400"):
        state.save(tmp_path / "state", backbone)
    assert not list(tmp_path.iterdir())
