"""The four ways to give each token the matrix of its experts."""

import jax
import numpy as np
import pytest
from keras import ops

from keras_mamba2.ops import experts as module
from keras_mamba2.ops.experts import grouped_matmul
from tests import reference

N, D, F, E, K = 10, 4, 6, 5, 2
EPS = np.finfo("float32").eps


def token_by_token(x, weights, up, down, experts):
    """`y` `(n d)`."""
    terms = [
        [w * np.tanh(a @ up[e]) @ down[e] for w, e in zip(*chosen, strict=True)]
        for a, *chosen in zip(x, weights, experts, strict=True)
    ]
    return np.sum(terms, axis=1)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    x, up, down = (rng.normal(size=size) for size in ((N, D), (E, D, F), (E, F, D)))
    weights = rng.uniform(size=(N, K))
    # Of the last expert no token wants anything.
    experts = np.stack([rng.choice(E - 1, K, replace=False) for _ in range(N)])
    y = token_by_token(x, weights, up, down, experts)
    return *(a.astype("float32") for a in (x, weights, up, down)), experts.astype("int32"), y


def compute_with(up, down):
    return lambda x, matmul: matmul(ops.tanh(matmul(x, up)), down)


def close(actual, truth):
    np.testing.assert_allclose(actual, truth, rtol=0, atol=32 * EPS * np.abs(truth).max())


WAYS = {
    "sliced": lambda x, w, e, compute: ops.concatenate(
        [module._sliced(x[i : i + 1], w[i : i + 1], e[i : i + 1], compute) for i in range(len(x))]
    ),
    "gathered": lambda x, w, e, compute: module._gathered(x, w, e, compute),
    "sorted": lambda x, w, e, compute: module._sorted(x, w, e, E, compute),
    "all": lambda x, w, e, compute: module._all_experts(x, w, e, E, compute),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_token_by_token(case, way):
    x, weights, up, down, experts, truth = case
    run = jax.jit(lambda x, w, e: WAYS[way](x, w, e, compute_with(up, down)))
    close(run(x, weights, experts), truth)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_has_the_same_gradients(case, way):
    *floats, experts, _ = case

    def loss(x, weights, up, down):
        return (WAYS[way](x, weights, experts, compute_with(up, down)) ** 2).sum()

    names = "x", "weights", "up", "down"
    truth = reference.gradients(
        lambda **a: (token_by_token(**a, experts=experts) ** 2).sum(),
        dict(zip(names, floats, strict=True)),
    )
    for name, gradient in zip(names, jax.grad(loss, argnums=(0, 1, 2, 3))(*floats), strict=True):
        close(gradient, truth[name])


@pytest.mark.parametrize("tokens", [1, 2, 3, N])
def test_any_number_of_tokens(case, tokens):
    x, weights, up, down, experts, truth = case
    few = slice(0, tokens)
    y = grouped_matmul(x[few], weights[few], experts[few], E, compute_with(up, down))
    close(y, truth[few])


def test_one_token_reads_the_experts_that_it_chooses(case):
    """No array of more than one expert is made on the way."""
    x, weights, up, down, experts, _ = case
    program = jax.jit(lambda x, w, e, up, down: grouped_matmul(x, w, e, E, compute_with(up, down)))
    text = program.lower(x[:1], weights[:1], experts[:1], up, down).as_text()
    made = [
        line
        for line in text.splitlines()
        if f"-> tensor<{K}x" in line or f"-> tensor<{E}x{D}" in line
    ]
    assert text.count("stablehlo.dynamic_slice") == 2 * K
    assert not made


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_loop_in_bfloat16_copies_no_experts(tokens):
    """Nor does it make float32 of them, before it begins or in it."""
    experts, d = 32, 128
    place = jax.ShapeDtypeStruct

    @jax.jit
    def loop(x, weights, chosen, kernels):
        def body(i, x):
            now = (chosen + i) % experts
            return grouped_matmul(x, weights, now, experts, lambda x, matmul: matmul(x, kernels))

        return jax.lax.fori_loop(0, 10, body, x)

    x, weights = place((tokens, d), "bfloat16"), place((tokens, K), "bfloat16")
    chosen, kernels = place((tokens, K), "int32"), place((experts, d, d), "bfloat16")
    memory = loop.lower(x, weights, chosen, kernels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < experts * d * d


@pytest.mark.parametrize("tokens", [1, 3])
def test_experts_in_bfloat16(case, tokens):
    """As in float32 of the same numbers, but for three roundings."""
    x, weights, up, down, experts, _ = case
    x, up, down = (ops.cast(a, "bfloat16") for a in (x[:tokens], up, down))

    def y(dtype):
        now, *kernels = (ops.cast(a, dtype) for a in (x, up, down))
        some = weights[:tokens], experts[:tokens]
        return ops.cast(grouped_matmul(now, *some, E, compute_with(*kernels)), "float32")

    bound = 3 * 2**-8 * np.abs(y("float32")).max()
    np.testing.assert_allclose(y("bfloat16"), y("float32"), rtol=0, atol=bound)
