"""Inputs of operations that are none: named, with what they must be, before they are computed."""

import numpy as np
import pytest

from keras_mamba2 import ops
from tests import bad_values
from tests.bad_values import NO_SIZE

B, T, H, P, G, N, K, E = 2, 5, 4, 3, 2, 6, 3, 7


def array(*shape):
    return np.ones(shape, "float32")


SSD = {
    "x": array(B, T, H, P),
    "dt": array(B, T, H),
    "A": -array(H),
    "B": array(B, T, G, N),
    "C": array(B, T, G, N),
    "D": array(H),
    "initial_state": array(B, H, P, N),
    "segment_ids": np.ones((B, T), "int32"),
}
STEP = {
    "x": array(B, H, P),
    "dt": array(B, H),
    "A": -array(H),
    "B": array(B, G, N),
    "C": array(B, G, N),
    "D": array(H),
    "state": array(B, H, P, N),
}
CONV = {
    "x": array(B, T, E),
    "kernel": array(K, E),
    "bias": array(E),
    "conv_state": array(B, K - 1, E),
    "mask": np.ones((B, T), bool),
    "segment_ids": np.ones((B, T), "int32"),
}
CONV_STEP = {
    "x": array(B, E),
    "kernel": array(K, E),
    "bias": array(E),
    "conv_state": array(B, K - 1, E),
}
OPS = {
    ops.ssd: SSD,
    ops.ssd_step: STEP,
    ops.causal_conv1d: CONV,
    ops.causal_conv1d_step: CONV_STEP,
}


def variants(value):
    """Of one input: lists, scalars, other ranks and sizes, and empty axes."""
    yield from (value.tolist(), 3.0, "x", float(value.flat[0]))
    yield value[None]
    yield value[0]
    for axis, size in enumerate(value.shape):
        larger = list(value.shape)
        larger[axis] = size + 1
        yield np.ones(larger, value.dtype)
        yield np.take(value, [], axis)


def wrong_inputs():
    for op, inputs in OPS.items():
        for name, value in inputs.items():
            for i, variant in enumerate(variants(value)):
                yield pytest.param(op, {name: variant}, name, id=f"{op.__name__}-{name}-{i}")
            if name != "mask":
                kind = "float32" if "segment" in name else "int32"
                for dtype in (kind, "complex64", "bool"):
                    wrong = {name: value.astype(dtype)}
                    yield pytest.param(op, wrong, name, id=f"{op.__name__}-{name}-{dtype}")


@pytest.mark.parametrize(("op", "change", "name"), list(wrong_inputs()))
def test_inputs_are_named(op, change, name):
    match = rf"`{name}`|number of groups|{name}\.shape"  # where two differ, either may be named
    bad_values.assert_refused(op, **OPS[op] | change, match=match)


@pytest.mark.parametrize("value", NO_SIZE, ids=repr)
def test_chunk_sizes(value):
    bad_values.assert_argument_refused(ops.ssd, "chunk_size", **SSD, chunk_size=value)


@pytest.mark.parametrize("op", [ops.ssd, ops.ssd_step])
def test_no_groups(op):
    none = {name: OPS[op][name][..., :0, :] for name in ("B", "C")}
    bad_values.assert_refused(op, **OPS[op] | none, match="`B`.*where g is at least one")


@pytest.mark.parametrize("op", OPS)
def test_no_rows(op):
    per_head = ("A", "D", "kernel", "bias")
    empty = {name: a if name in per_head else a[:0] for name, a in OPS[op].items()}
    bad_values.assert_refused(op, **empty, match="`x`.*where b is at least one.*Received: x.shape")


def test_a_kernel_of_one_tap_remembers_nothing():
    inputs = CONV | {"kernel": array(1, E), "conv_state": array(B, 0, E)}
    y, state = ops.causal_conv1d(**inputs)
    np.testing.assert_array_equal(y, inputs["x"] + 1)
    assert state.shape == (B, 0, E)
