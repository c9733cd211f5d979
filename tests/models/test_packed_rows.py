"""Documents that share a row get what they get alone: logits, gradients, and the state after."""

import jax
import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_mamba2 import Mamba2Backbone
from keras_mamba2 import Mamba2CausalLM
from keras_mamba2 import Mamba2HybridBackbone
from keras_mamba2.ops.segments import document_segments
from tests import reference
from tests.laws import examples

LENGTHS = (5, 1, 7, 2)  # shorter and longer than chunk and kernel
T = sum(LENGTHS)
EPS = np.finfo("float32").eps


@pytest.fixture(scope="module", params=["mamba2", pytest.param("hybrid", marks=pytest.mark.slow)])
def lm(request):
    arguments = {"state_dim": 4, "head_dim": 4, "num_groups": 2, "chunk_size": 4}
    if request.param == "mamba2":
        backbone = Mamba2Backbone(20, 2, 8, **arguments)
    else:
        attention = {"num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "rotary_dim": 4}
        sublayers = {"mamba2": arguments, "attention": attention}
        backbone = Mamba2HybridBackbone(20, 8, ["mamba2", "attention"], sublayers)
    lm = Mamba2CausalLM(backbone)
    reference.randomize(lm)
    return lm


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(20, size=(1, length)) for length in LENGTHS]


def packed(documents, left=0, right=0):
    numbers = [np.full(document.shape, i + 1) for i, document in enumerate(documents)]
    pad = [(0, 0), (left, right)]
    numbers = np.pad(np.concatenate(numbers, 1), pad)
    return {
        "token_ids": np.pad(np.concatenate(documents, 1), pad),
        "padding_mask": (numbers > 0).astype("int32"),
        "segment_ids": numbers,
    }


def close(actual, expected, roundings=64):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, 0, roundings * EPS * np.abs(expected).max())


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 2), (1, 4)])
def test_logits_and_state_are_those_of_each_document_alone(lm, documents, left, right):
    inputs = packed(documents, left, right)
    row = lm(inputs)[:, left : left + T]
    alone = [lm({"token_ids": d, "padding_mask": np.ones(d.shape)}) for d in documents]
    close(row, ops.concatenate(alone, axis=1))
    _, state = lm.backbone.call_with_state(**inputs)
    _, last = lm.backbone.call_with_state(documents[-1])
    jax.tree.map(close, state.layers, last.layers)
    assert state.length == T


def test_the_state_before_belongs_to_the_first_document(lm, documents):
    before, *rest = documents
    _, state = lm.backbone.call_with_state(before)
    hidden_states, _ = lm.backbone.call_with_state(state=state, **packed(rest, left=1))
    joined = np.concatenate([before, rest[0]], axis=1)
    expected, _ = lm.backbone.call_with_state(joined)
    close(hidden_states[:, 1 : 1 + LENGTHS[1]], expected[:, LENGTHS[0] :])
    alone, _ = lm.backbone.call_with_state(rest[1])
    close(hidden_states[:, 1 + LENGTHS[1] :][:, : LENGTHS[2]], alone)


def test_a_mask_alone_is_one_document(lm, documents):
    token_ids, numbers, _ = packed(documents).values()
    for mask in (numbers, numbers > 0, 7 * numbers):
        found, _ = lm.backbone.call_with_state(token_ids, padding_mask=mask)
        np.testing.assert_array_equal(found, lm.backbone.call_with_state(token_ids)[0])


def test_numbers_in_padding_do_not_matter(lm, documents):
    inputs = packed(documents, 3, 2)
    other = {**inputs, "segment_ids": inputs["segment_ids"] + 5}
    other["segment_ids"][:, :3], other["segment_ids"][:, -2:] = [1, 9, 2], [3, 6]
    np.testing.assert_array_equal(lm(other)[:, 3 : 3 + T], lm(inputs)[:, 3 : 3 + T])


@pytest.mark.skipif(keras.config.backend() != "jax", reason="takes gradients with jax.grad")
@pytest.mark.slow
def test_gradients_are_the_sum_over_documents_alone(lm, documents):
    rng = np.random.default_rng(1)
    weights = [np.float32(rng.normal(size=(1, length, 8))) for length in LENGTHS]
    variables = lm.trainable_variables

    @jax.jit
    def gradients(values, inputs, weights):
        def loss(values):
            with keras.StatelessScope(list(zip(variables, values, strict=True))):
                y = lm.backbone(inputs)
            return (y * weights).sum()

        return jax.grad(loss)(values)

    values = [variable.value for variable in variables]
    row = gradients(values, packed(documents), np.concatenate(weights, axis=1))
    alone = [
        gradients(values, packed([document]), weight)
        for document, weight in zip(documents, weights, strict=True)
    ]
    for i, gradient in enumerate(row):
        total = np.sum([parts[i] for parts in alone], axis=0, dtype="float64")
        assert np.abs(total).max() > 0
        close(gradient, total, 512)


@examples(30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 3))
def test_segments_begin_where_documents_do(lengths, left, right):
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    mask = np.pad(np.ones(len(numbers), bool), (left, right))
    ids = np.pad(7 - numbers, (left, right), constant_values=3)
    segment_ids = document_segments(ops.array(ids[None]), ops.array(mask[None]))
    segment_ids = ops.convert_to_numpy(segment_ids)[0]
    np.testing.assert_array_equal(segment_ids, np.pad(numbers, (left, right), mode="edge"))
