# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The SSD operation beyond Mamba-2
#
# `keras_mamba2.ops.ssd` computes, chunk by chunk and in plain einsums, the recurrence
#
# $$ S_t = e^{\Delta_t A}\, S_{t-1} + \Delta_t\, x_t B_t^\top, \qquad y_t = S_t\, C_t $$
#
# for every head, with a state $S$ of $p \times n$ numbers. That is Mamba-2. It is also linear
# attention, RetNet's retention, and linear attention with a gate, with other names for the same
# letters: $C$ is the query, $B$ the key, $x$ the value, and $e^{\Delta A}$ the decay. This guide
# builds the three, compares each with its own definition, decodes token by token from a state,
# and times both.

# %%
# In Colab this installs the package; elsewhere it does nothing.
import importlib.util
import pathlib
import subprocess
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("keras_mamba2") is None:
    source = ""
    if not source:  # not published yet: from a wheel beside this notebook, or its own repository
        wheels = sorted(map(str, pathlib.Path().glob("keras_mamba2-*.whl")))
        source = wheels[-1] if wheels else ".."
        if not wheels and not pathlib.Path("../pyproject.toml").exists():
            raise FileNotFoundError(
                "keras_mamba2 is not published yet. Make a wheel with `pip wheel --no-deps .` in "
                "its repository, upload it here (Files, on the left), and run this cell again."
            )
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import time

import jax
import numpy as np
from keras import ops

import keras_mamba2.ops

SIZES = {"b": 2, "t": 512, "h": 4, "n": 32, "p": 32}


def random_inputs(b, t, h, n, p):
    """Queries and keys `(b t h n)`, values `(b t h p)`."""
    rng = np.random.default_rng(0)
    shapes = ((b, t, h, n), (b, t, h, n), (b, t, h, p))
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


q, k, v = random_inputs(**SIZES)

# %% [markdown]
# ## Linear attention
#
# Nothing decays: $A = 0$. Every head has its own keys, so there are as many groups as heads. The
# sum of weights that the output is divided by is one more channel of the values, of ones.


# %%
def feature_map(x):
    return ops.elu(x) + 1


def linear_attention(q, k, v):
    b, t, h, _ = k.shape
    values = ops.concatenate([v, ops.ones((b, t, h, 1))], axis=-1)
    dt, A = ops.ones((b, t, h)), ops.zeros((h,))
    y, _ = keras_mamba2.ops.ssd(values, dt, A, B=feature_map(k), C=feature_map(q))
    return y[..., :-1] / y[..., -1:]


def linear_attention_by_definition(q, k, v):
    weights = np.einsum("blhn,bshn->bhls", feature_map(q), feature_map(k))
    weights = np.tril(weights)
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhls,bshp->blhp", weights, v)


# %% [markdown]
# ## Retention
#
# Each head forgets at a rate of its own, $\gamma_h$: $A = \log \gamma$, and the step is 1.

# %%
GAMMA = 1 - 2.0 ** (-5 - np.arange(SIZES["h"], dtype="float32"))


def retention(q, k, v, initial_state=None):
    """Outputs `(b t h p)`, and the state `(b h p n)` after the last token."""
    b, t, h, n = k.shape
    dt, A = ops.ones((b, t, h)), np.log(GAMMA)
    return keras_mamba2.ops.ssd(v, dt, A, k, q / n**0.5, initial_state=initial_state)


def retention_by_definition(q, k, v):
    distance = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    decay = np.where(distance >= 0, GAMMA[:, None, None] ** np.maximum(distance, 0), 0)
    weights = np.einsum("blhn,bshn->bhls", q, k) / k.shape[-1] ** 0.5
    return np.einsum("bhls,bshp->blhp", weights * decay, v)


# %% [markdown]
# ## Linear attention with a scalar gate
#
# Now the decay $a_t$ depends on the token, between 0 and 1. SSD multiplies values by the same
# $\Delta$ as the decay, and so they are divided by it first: with $A = -1$ and $\Delta = -\log a$
# the decay is $a$ and the value enters as it is.

# %%
gate = np.random.default_rng(1).uniform(0.5, 0.999, (SIZES["b"], SIZES["t"], SIZES["h"]))
gate = gate.astype("float32")


def gated_linear_attention(q, k, v, gate):
    dt = ops.maximum(-ops.log(gate), 1e-6)
    y, _ = keras_mamba2.ops.ssd(v / dt[..., None], dt, -ops.ones(dt.shape[-1]), k, q)
    return y


def gated_linear_attention_by_definition(q, k, v, gate):
    b, _, h, n = k.shape
    state, ys = np.zeros((b, h, v.shape[-1], n)), []
    for i in range(k.shape[1]):
        state = gate[:, i, :, None, None] * state + v[:, i, ..., None] * k[:, i, :, None]
        ys.append(np.einsum("bhpn,bhn->bhp", state, q[:, i]))
    return np.stack(ys, axis=1)


# %% [markdown]
# ## The same numbers

# %%
PAIRS = {
    "linear attention": (linear_attention(q, k, v), linear_attention_by_definition(q, k, v)),
    "retention": (retention(q, k, v)[0], retention_by_definition(q, k, v)),
    "gated linear attention": (
        gated_linear_attention(q, k, v, gate),
        gated_linear_attention_by_definition(q, k, v, gate),
    ),
}
errors = {}
for name, (found, expected) in PAIRS.items():
    errors[name] = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    print(f"{name}: largest error {errors[name]:.0e} of the largest output")

# %% [markdown]
# ## From a state, token by token
#
# `ssd_step` takes one token and the state before it. A prompt is read by `ssd`, and decoding goes
# on from its state, at a cost that does not depend on how long the prompt was.

# %%
half = SIZES["t"] // 2
_, state = retention(q[:, :half], k[:, :half], v[:, :half])
steps = []
for i in range(half, SIZES["t"]):
    dt = ops.ones((SIZES["b"], SIZES["h"]))
    queries = q[:, i] / SIZES["n"] ** 0.5
    y, state = keras_mamba2.ops.ssd_step(v[:, i], dt, np.log(GAMMA), k[:, i], queries, state=state)
    steps.append(np.asarray(y))
whole = np.asarray(retention(q, k, v)[0])[:, half:]
errors["step by step"] = np.abs(np.stack(steps, axis=1) - whole).max() / np.abs(whole).max()
print(f"step by step: largest difference {errors['step by step']:.0e}")

# %% [markdown]
# ## Speed
#
# Beside a recurrence of one token after another, compiled as well. Chunks turn most of the work
# into matrix products.


# %%
@jax.jit
def retention_token_by_token(q, k, v):
    def step(state, inputs):
        q, k, v = inputs
        state = GAMMA[:, None, None] * state + v[..., None] * k[..., None, :]
        return state, (state @ q[..., None])[..., 0]

    b, _, h, n = k.shape
    inputs = [a.swapaxes(0, 1) for a in (q / n**0.5, k, v)]
    _, y = jax.lax.scan(step, np.zeros((b, h, v.shape[-1], n), "float32"), inputs)
    return y.swapaxes(0, 1)


def milliseconds(function):
    function(q, k, v).block_until_ready()
    begun = time.perf_counter()
    for _ in range(5):
        function(q, k, v).block_until_ready()
    return 200 * (time.perf_counter() - begun)


in_chunks = milliseconds(jax.jit(lambda q, k, v: retention(q, k, v)[0]))
one_by_one = milliseconds(retention_token_by_token)
print(f"{in_chunks:.1f} ms in chunks, {one_by_one:.1f} ms token by token")
