"""The laws of whatever stands in a block; `tests/reference.py` is the truth.

A sequence at once, in parts after a state, and token by token are one function, and padding, other
documents and what comes later change nothing in it. `test_mamba2_mixer.py` has more of the mixer.
"""

import functools
import json

import jax
import keras
import numpy as np
import pytest
from keras import ops
from keras import tree

from keras_mamba2.host.room import LEAST_ROOM
from keras_mamba2.layers import MLP
from keras_mamba2.layers import Attention
from keras_mamba2.layers import Mamba2Mixer
from keras_mamba2.layers import MixtureOfExperts
from keras_mamba2.layers import Parallel
from keras_mamba2.layers import SharedTransformer
from tests import reference

EPS = np.finfo(np.float32).eps
D, T = 12, 9
ATTENTION = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
EXPERTS = {"intermediate_dim": 7, "num_experts": 6, "num_experts_per_token": 3}
SIGMOID = {**EXPERTS, "num_experts": 8, "scoring": "sigmoid", "weights_multiplier": 2.5}
MIXER = {"state_dim": 3, "head_dim": 4, "num_groups": 2, "chunk_size": 4}
CASES = {
    "attention": (Attention, ATTENTION),
    "attention, rotary": (Attention, {**ATTENTION, "rotary_dim": 6, "use_bias": True}),
    "attention, partly rotary": (
        Attention,
        {**ATTENTION, "rotary_dim": 4, "rope_max_wavelength": 50.0, "scale": 0.3},
    ),
    "attention, one key a query": (
        Attention,
        {**ATTENTION, "num_key_value_heads": 4, "key_multiplier": 0.4, "adapter_rank": 2},
    ),
    "attention, convolution": (Attention, {**ATTENTION, "rotary_dim": 2, "conv_kernel_size": 4}),
    "mlp": (MLP, {"intermediate_dim": 20, "gate_multiplier": 0.7}),
    "mlp, not gated": (
        MLP,
        {"intermediate_dim": 20, "gated": False, "activation": "squared_relu", "use_bias": True},
    ),
    "mlp, adapter": (MLP, {"intermediate_dim": 20, "activation": "gelu", "adapter_rank": 2}),
    "experts": (MixtureOfExperts, EXPERTS),
    "experts, sigmoid": (
        MixtureOfExperts,
        {**SIGMOID, "gated": False, "activation": "squared_relu"},
    ),
    "experts, groups": (
        MixtureOfExperts,
        {**SIGMOID, "num_expert_groups": 4, "num_groups_per_token": 2, "latent_dim": 5},
    ),
    "experts, not normalized": (MixtureOfExperts, {**SIGMOID, "normalize_weights": False}),
    "mixer": (Mamba2Mixer, MIXER),
    "mixer, gate alone": (
        Mamba2Mixer,
        {**MIXER, "gated_norm": "none", "projection_multipliers": (0.4, 0.3, 2.0, 0.5, 1.3)},
    ),
    "mixer, gate after norm": (
        Mamba2Mixer,
        {**MIXER, "gated_norm": "before_gate", "use_bias": True, "use_output_bias": False},
    ),
    "parallel": (
        Parallel,
        {"input_multipliers": (0.5, 1.5), "output_multipliers": (2.0, 0.25)},
    ),
    "shared transformer": (
        SharedTransformer,
        {"attention": ATTENTION, "mlp": {"intermediate_dim": 20, "activation": "gelu"}},
    ),
}
STATELESS = [name for name in CASES if name.startswith(("mlp", "experts"))]
STATEFUL = [name for name in CASES if name not in STATELESS]
every = pytest.mark.parametrize("name", CASES)
stateful = pytest.mark.parametrize("name", STATEFUL)


@functools.cache
def layer_of(name):
    kind, arguments = CASES[name]
    if kind is Parallel:
        parts = [
            Mamba2Mixer(D, **MIXER, name="mamba2"),
            Attention(D, **ATTENTION, rotary_dim=6, name="attention"),
        ]
        layer = Parallel(parts, **arguments)
    else:
        layer = kind(D, **arguments)
    layer.build((None, None, size_of(name)))
    reference.randomize(layer)
    return layer


def size_of(name):
    return 2 * D if name == "shared transformer" else D


def random_input(name, b=2, t=T, seed=1):
    return np.random.default_rng(seed).normal(size=(b, t, size_of(name))).astype("float32")


def truth_of(layer, x):
    weights, config = reference.weights_of(layer), layer.get_config()
    if isinstance(layer, Parallel):
        return sum(
            after * _truth(part, before * x, reference.below(part.name, weights))
            for part, before, after in zip(
                layer.sublayers, layer.input_multipliers, layer.output_multipliers, strict=True
            )
        )
    if isinstance(layer, SharedTransformer):
        norm, mlp_norm = (weights[f"{name}/scale"] for name in ("norm", "mlp_norm"))
        y = reference.gated_rms_normalization(x, norm)
        y = _truth(layer.attention, y, reference.below("attention", weights))
        y = reference.gated_rms_normalization(y, mlp_norm)
        y = _truth(layer.mlp, y, reference.below("mlp", weights))
        return reference.dense(y, weights, "linear")
    return _truth(layer, x, weights, config)


def _truth(layer, x, weights, config=None):
    config = config or layer.get_config()
    truths = {
        Attention: reference.attention,
        MLP: reference.mlp,
        MixtureOfExperts: reference.mixture_of_experts,
        Mamba2Mixer: lambda *arguments: reference.mixer(*arguments)[0],
    }
    return truths[type(layer)](x, weights, config)


@functools.cache
def programs(name):
    layer = layer_of(name)
    return jax.jit(layer.__call__), jax.jit(layer.call_with_state), jax.jit(layer.step)


def assert_close(actual, truth):
    actual = np.asarray(actual, np.float64)
    assert actual.shape == truth.shape
    assert np.abs(actual - truth).max() <= 64 * EPS * np.abs(truth).max()


def assert_same_state(layer, state, other):
    """Of keys and values what is filled, since behind it nothing counts."""
    specs = tree.flatten(layer.state_spec())
    for spec, a, b in zip(specs, tree.flatten(state), tree.flatten(other), strict=True):
        if spec.room_axis is None:
            assert_close(a, np.asarray(b, np.float64))
    filled = lengths(state)
    if filled is not None:
        for spec, a, b in zip(specs, tree.flatten(state), tree.flatten(other), strict=True):
            if spec.room_axis is not None:
                for row, n in enumerate(np.asarray(filled)):
                    assert_close(a[row][:, :n], np.asarray(b[row][:, :n], np.float64))


def lengths(state):
    if hasattr(state, "length"):
        return state.length
    found = [lengths(part) for part in state] if isinstance(state, tuple) else []
    return next((length for length in found if length is not None), None)


@every
def test_a_sequence_is_the_reference(name):
    layer, x = layer_of(name), random_input(name)
    whole, with_state, _ = programs(name)
    truth = truth_of(layer, x)
    assert_close(whole(x), truth)
    assert_close(with_state(x)[0], truth)


@every
def test_a_prefix_and_steps_are_the_whole(name):
    layer, x = layer_of(name), random_input(name)
    _, with_state, step = programs(name)
    truth = truth_of(layer, x)
    for split in (0, 1, 4, T - 1):
        state, ys = layer.initial_state(2, T), []
        if split:
            y, state = with_state(x[:, :split], state)
            ys = list(np.moveaxis(np.asarray(y), 1, 0))
        for i in range(split, T):
            y, state = step(x[:, i], state)
            ys.append(np.asarray(y))
        assert_close(np.stack(ys, axis=1), truth)
        assert_same_state(layer, state, with_state(x, layer.initial_state(2, T))[1])


@stateful
def test_two_parts_are_the_whole(name):
    layer, x = layer_of(name), random_input(name)
    _, with_state, _ = programs(name)
    first, state = with_state(x[:, :4], layer.initial_state(2, T))
    second, state = with_state(x[:, 4:], state)
    assert_close(np.concatenate([first, second], axis=1), truth_of(layer, x))
    assert_same_state(layer, state, with_state(x, layer.initial_state(2, T))[1])


@stateful
def test_padding_changes_nothing(name):
    layer, real = layer_of(name), random_input(name, b=6)
    spans = ((0, 4), (3, 7), (2, 6), (0, T), (T - 2, T), (0, 0))
    mask = np.zeros((6, T), bool)
    x = np.full((6, T, size_of(name)), 30.0, "float32")  # what is padded is not looked at
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
        x[row, start:end] = real[row, : end - start]
    before = random_input(name, b=6, t=3, seed=2)
    whole, with_state, _ = programs(name)
    _, state = with_state(before, layer.initial_state(6, T + 3))
    alone = whole(x, mask=mask)
    y, after = with_state(x, state, mask)
    for row, (start, end) in enumerate(spans):
        here, count = slice(row, row + 1), end - start
        old = tree.map_structure(lambda leaf, here=here: leaf[here], state)
        new = tree.map_structure(lambda leaf, here=here: leaf[here], after)
        if not count:
            assert_same_state(layer, new, old)
            continue
        assert_close(alone[here, start:end], truth_of(layer, real[here, :count]))
        joined = np.concatenate([before[here], real[here, :count]], axis=1)
        assert_close(y[here, start:end], truth_of(layer, joined)[:, 3:])
        assert_same_state(layer, new, with_state(joined, layer.initial_state(1, T + 3))[1])


@stateful
def test_documents_of_a_row_do_not_see_each_other(name):
    layer, x = layer_of(name), random_input(name)
    segments = np.repeat([0, 1, 2], [3, 4, 2])[None].repeat(2, axis=0).astype("int32")
    before = random_input(name, t=2, seed=3)
    whole, with_state, _ = programs(name)
    _, state = with_state(before, layer.initial_state(2, T + 2))
    y, after = with_state(x, state, None, segments)
    parts = np.split(x, [3, 7], axis=1)
    assert_close(
        whole(x, segment_ids=segments),
        np.concatenate([truth_of(layer, part) for part in parts], axis=1),
    )
    # The state before belongs to the first document, the state after to the last.
    first = np.concatenate([before, parts[0]], axis=1)
    truths = [truth_of(layer, first)[:, 2:], *(truth_of(layer, part) for part in parts[1:])]
    assert_close(y, np.concatenate(truths, axis=1))
    assert_same_state(layer, after, with_state(parts[2], layer.initial_state(2, T))[1])


@stateful
def test_a_masked_step_leaves_the_state_as_it_was(name):
    layer, x = layer_of(name), random_input(name, b=3)
    _, with_state, step = programs(name)
    # Of attention one place is free: what does not go on may not take it from the other rows.
    _, before = with_state(x[:, :5], layer.initial_state(3, 6))
    y, after = step(x[:, 5], before)
    masked_y, masked = step(x[:, 5], before, np.array([True, False, True]))
    for old, new, actual in zip(*map(tree.flatten, (before, after, masked)), strict=True):
        np.testing.assert_array_equal(actual[1], old[1])
        assert_close(np.asarray(actual)[::2], np.asarray(new)[::2])
    assert_close(np.asarray(masked_y)[::2], np.asarray(y)[::2])
    # A full row that does not go on keeps what it has.
    _, again = step(x[:, 6], after, np.array([False, False, False]))
    for old, new in zip(tree.flatten(after), tree.flatten(again), strict=True):
        np.testing.assert_array_equal(old, new)


@functools.cache
def open_chunk_programs(name):
    layer = layer_of(name)
    return jax.jit(layer.extend), jax.jit(layer.commit)


@every
def test_an_open_chunk_is_the_sequence_and_can_be_taken_back(name):
    layer, x = layer_of(name), random_input(name, b=4)
    _, with_state, _ = programs(name)
    extend, commit = open_chunk_programs(name)
    before = 3
    # Of attention the last place is used up by the row that takes the whole chunk.
    _, state = with_state(x[:, :before], layer.initial_state(4, T))
    chunk, ys = layer.open_chunk(4, T - before), []
    assert chunk == () or {leaf.shape[0] for leaf in tree.flatten(chunk)} == {4}
    wrong = random_input(name, b=4, t=2, seed=5)
    for start, t in ((0, 3), (3, 1), (4, 2)):
        if start == 3:  # two tokens are read and taken back: others come to their places
            _, chunk = extend(wrong, state, chunk, start)
        y, chunk = extend(x[:, before + start :][:, :t], state, chunk, start)
        ys.append(np.asarray(y))
    assert_close(np.concatenate(ys, axis=1), truth_of(layer, x)[:, before:])
    count = np.array([0, 1, 4, T - before], "int32")
    after = commit(state, chunk, count)
    for row, n in enumerate(before + count):
        new = tree.map_structure(lambda leaf, row=row: leaf[row : row + 1], after)
        truth = with_state(x[row : row + 1, :n], layer.initial_state(1, T))[1]
        assert_same_state(layer, new, truth)


@pytest.mark.slow
def test_keys_and_values_in_int8_are_rounded_once():
    """In parts, in steps and in an open chunk alike; and little is lost."""
    exact = layer_of("attention, rotary")
    layer = Attention.from_config({**exact.get_config(), "key_value_dtype": "int8"})
    layer.build((None, None, D))
    for new, old in zip(layer.weights, exact.weights, strict=True):
        new.assign(old)
    x = random_input("attention, rotary")
    whole, state = layer.call_with_state(x, layer.initial_state(2, T))
    truth = truth_of(exact, x)
    assert np.abs(np.asarray(whole) - truth).max() <= 0.02 * np.abs(truth).max()
    assert {spec.dtype for spec in tree.flatten(layer.state_spec(T))} == {
        "int8",
        "int32",
        "float32",
    }

    truth = np.asarray(whole, np.float64)
    first, before = layer.call_with_state(x[:, :4], layer.initial_state(2, T))
    second, after = layer.call_with_state(x[:, 4:], before)
    assert_close(np.concatenate([first, second], axis=1), truth)
    chunk = layer.open_chunk(2, T - 4)
    y, chunk = layer.extend(x[:, 4:], before, chunk, 0)
    assert_close(y, truth[:, 4:])
    states = [state, after, layer.commit(before, chunk, np.array([T - 4, T - 4], "int32"))]
    one, ys = before, []
    for i in range(4, T):
        y, one = layer.step(x[:, i], one)
        ys.append(y)
    assert_close(np.stack(ys, axis=1), truth[:, 4:])
    for other in [*states[1:], one]:
        for ours, theirs in zip(tree.flatten(other), tree.flatten(state), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


@every
def test_no_output_depends_on_a_later_or_a_padded_input(name):
    layer, x = layer_of(name), random_input(name, b=1, t=7)
    mask = np.array([[False, True, True, True, True, True, False]])
    gradient = jax.jit(jax.grad(lambda x, i: layer(x, mask=mask)[:, i].sum()))
    size = np.stack(
        [np.abs(gradient(x, i)).sum(axis=(0, 2)) for i in range(1, 6)]
    )  # (target source)
    np.testing.assert_array_equal(np.triu(size, 2), 0)
    np.testing.assert_array_equal(size[:, 0], 0)
    seen = size[:, 1:6][np.tril_indices(5) if name in STATEFUL else np.diag_indices(5)]
    assert np.all(seen > 0)


@every
def test_the_state_is_as_specified(name):
    layer = layer_of(name)
    state = layer.initial_state(3, 20)
    _, after = programs(name)[1](random_input(name, b=3), state)
    for spec, leaf, new in zip(
        *map(tree.flatten, (layer.state_spec(20), state, after)), strict=True
    ):
        assert tuple(leaf.shape) == tuple(new.shape) == (3, *spec.shape)
        assert str(leaf.dtype) == str(new.dtype) == spec.dtype
    room = {
        s.shape[s.room_axis] for s in tree.flatten(layer.state_spec()) if s.room_axis is not None
    }
    assert room == (
        {None} if "attention" in name or name in ("parallel", "shared transformer") else set()
    )
    if room:
        assert LEAST_ROOM in {
            n for leaf in tree.flatten(layer.initial_state(1)) for n in leaf.shape
        }


@every
def test_a_layer_is_what_its_configuration_says(name):
    layer = layer_of(name)
    config = json.loads(json.dumps(layer.get_config()))
    again = type(layer).from_config(config)
    again.build((None, None, size_of(name)))
    assert json.loads(json.dumps(again.get_config())) == config
    for new, old in zip(again.weights, layer.weights, strict=True):
        assert (new.shape, new.name) == (old.shape, old.name)
        new.assign(old)
    x = random_input(name)
    np.testing.assert_array_equal(np.asarray(programs(name)[0](x)), np.asarray(jax.jit(again)(x)))


@every
def test_axes_of_weights_are_those_of_the_weights(name):
    layer = layer_of(name)
    shapes = {
        variable.path.removeprefix(f"{layer.name}/"): tuple(variable.shape)
        for variable in layer.weights
    }
    assert layer.weight_axes
    for path, axes in layer.weight_axes.items():
        # Of several channels that belong together, as those of a head, their number is named.
        sizes = zip(axes.values(), shapes[path], strict=True)
        assert all(whole % named == 0 for named, whole in sizes), path


@every
def test_projections_are_all_the_matrices_that_lora_and_quantization_know(name):
    layer = layer_of(name)
    kernels = {w.path for w in layer.weights if w.path.endswith("/kernel")}
    assert {projection.kernel.path for projection in layer.projections} == kernels


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("parallel",)])
def test_low_precision_is_near_the_truth(name, policy):
    kind, arguments = CASES[name]
    layer = kind(D, **arguments, dtype=policy)
    layer.build((None, None, size_of(name)))
    reference.randomize(layer)
    dtype = keras.DTypePolicy(policy).compute_dtype
    x = ops.cast(random_input(name), dtype)
    y = jax.jit(layer.__call__)(x)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    truth = truth_of(layer, np.asarray(ops.cast(x, "float32")))
    error = np.abs(np.asarray(ops.cast(y, "float32"), np.float64) - truth).max(-1)
    eps = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    is_near = error <= 8 * eps * np.abs(truth).max()
    # An expert chosen by a rounding is another one.
    assert is_near.mean() > 0.8 if name.startswith("experts") else is_near.all()
    if "attention" in name:  # which has another product for masks
        masked = jax.jit(lambda x: layer(x, mask=np.ones(x.shape[:2], bool)))(x)
        assert np.abs(np.asarray(masked - y, np.float64)).max() <= 8 * eps * np.abs(truth).max()


class TestAttention:
    def test_without_room_outputs_are_nan(self):
        """What did not fit would be missing in silence."""
        layer, x = layer_of("attention"), random_input("attention")
        _, with_state, step = programs("attention")
        y, state = with_state(x[:, :4], layer.initial_state(2, 4))
        assert np.isfinite(y).all()
        y, state = step(x[:, 4], state)
        assert np.isnan(y).all()
        y, _ = with_state(x[:, :5], layer.initial_state(2, 4))
        assert np.isnan(y).all()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_key_value_heads": 3}, "num_query_heads=4, num_key_value_heads=3"),
            ({"rotary_dim": 3}, "rotary_dim=3"),
            ({"rotary_dim": 8}, "rotary_dim=8, head_dim=6"),
            ({"head_dim": 0}, "head_dim.*0"),
        ],
    )
    def test_bad_arguments_are_named(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Attention(D, **{**ATTENTION, **changes})


class TestMixtureOfExperts:
    @pytest.mark.parametrize("tokens", [1, 2, 40])
    def test_few_and_many_tokens_are_the_reference(self, tokens):
        layer, x = layer_of("experts"), random_input("experts", b=1, t=tokens)
        assert_close(layer(x), truth_of(layer, x))

    def test_experts_of_a_token_are_the_best(self):
        layer, x = layer_of("experts, groups"), random_input("experts, groups")[0]
        weights, experts = layer.route(x)
        truths = reference.weights_of(layer)
        for token, weight, expert in zip(x, np.asarray(weights), np.asarray(experts), strict=True):
            expected = dict(reference.routes(np.float64(token), truths, layer.get_config()))
            assert set(expert) == set(expected)
            found = dict(zip(expert, weight, strict=True))
            for number, value in expected.items():
                assert abs(found[number] - value) < 1e-5

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_experts_per_token": 7}, "cannot take 7 of 6"),
            ({"scoring": "relu"}, "`scoring` must be one of 'softmax', 'sigmoid'.*'relu'"),
            ({"num_expert_groups": 2}, "need scoring='sigmoid'"),
            ({"scoring": "sigmoid", "num_expert_groups": 4}, "num_expert_groups=4"),
            ({"activation": "tanh"}, "`activation` must be one of .*'tanh'"),
        ],
    )
    def test_bad_arguments_are_named(self, changes, message):
        with pytest.raises(ValueError, match=message):
            MixtureOfExperts(D, **{**EXPERTS, **changes})


def test_sublayers_side_by_side_have_names_that_differ():
    """Otherwise files of weights would hold two variables under one path."""
    with pytest.raises(ValueError, match="names that differ.*Received: 'a', 'b', 'a'"):
        Parallel([MLP(D, intermediate_dim=4, name=name) for name in "aba"])


@every
def test_shapes_are_known_before_anything_runs(name):
    layer = layer_of(name)
    width = 2 * D if "shared" in name else D
    spec = (
        layer(keras.Input((None, width)), training=True)
        if name in STATELESS
        else layer(keras.Input((None, width)))
    )
    assert spec.shape == (None, None, D)
    assert layer.compute_output_shape((2, 3, width)) == (2, 3, D)


@pytest.mark.parametrize("name", ["attention", "attention, rotary", "mixer", "parallel"])
def test_the_number_of_a_document_may_come_back(name):
    """It is another document then, in a call and after a state."""
    layer = layer_of(name)
    x = np.random.default_rng(0).normal(size=(1, T, D)).astype("float32")
    back = np.array([[5, 5, 7, 7, 7, 5, 5, 5, 5]])
    apart = np.array([[0, 0, 1, 1, 1, 2, 2, 2, 2]])
    np.testing.assert_array_equal(layer(x, segment_ids=back), layer(x, segment_ids=apart))
    found, expected = (layer.call_with_state(x, segment_ids=ids) for ids in (back, apart))
    for ours, theirs in zip(tree.flatten(found), tree.flatten(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
