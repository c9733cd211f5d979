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
# # Several devices
#
# `keras.distribution` spreads a model over devices, and the code that trains it stays what it was.
# This guide cuts the batch, the weights, the heads and the sequence in turn, and reads from the
# compiled programs what the devices say to each other. It runs on the devices at hand; where there
# is only a CPU, on eight virtual ones.

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
# Devices for a machine that has none; accelerators stay what they are.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import collections
import re

import jax
import keras
import numpy as np

import keras_mamba2

devices = keras.distribution.list_devices()
print(len(devices), "devices:", ", ".join(devices))

# %% [markdown]
# A model of its own for this guide, small enough that a laptop compiles it in seconds. Training
# rows are packed: several documents share one, told apart by `segment_ids`.

# %%
SEQUENCE_LENGTH = 128
BATCH_SIZE = 2 * len(devices)


def make_model():
    keras.utils.set_random_seed(0)
    backbone = keras_mamba2.Mamba2Backbone(
        vocabulary_size=256, num_layers=2, hidden_dim=64, state_dim=16, head_dim=16
    )
    lm = keras_mamba2.Mamba2CausalLM(backbone)
    lm.compile(optimizer=keras.optimizers.Adam(1e-2), sampler="greedy")
    return lm


rng = np.random.default_rng(0)
token_ids = np.cumsum(rng.integers(0, 3, size=(BATCH_SIZE, SEQUENCE_LENGTH + 1)), axis=1) % 256
segment_ids = np.cumsum(rng.random((BATCH_SIZE, SEQUENCE_LENGTH)) < 0.02, axis=1)
x, y = {"token_ids": token_ids[:, :-1], "segment_ids": segment_ids}, token_ids[:, 1:]
x["padding_mask"] = np.ones_like(segment_ids)

# %% [markdown]
# ## Cut the batch
#
# `DataParallel` keeps a copy of the weights on every device. A model that is made in its scope, or
# loaded there, is distributed; `fit`, `evaluate` and `generate` are what they are on one device.

# %%
one = make_model()
losses = {"one device": one.fit(x, y, batch_size=BATCH_SIZE, epochs=3, verbose=0).history["loss"]}

with keras.distribution.DataParallel(devices=devices).scope():
    lm = make_model()
    history = lm.fit(x, y, batch_size=BATCH_SIZE, epochs=3, verbose=1)
    losses["cut batch"] = history.history["loss"]

# %% [markdown]
# ## Cut the weights, the heads, or the sequence
#
# `ModelParallel` takes a mesh of devices and a map that says along which of its axes something is
# cut. `Mamba2Backbone.get_layout_map` makes the map for the axes that a mesh has:
#
# - `batch` cuts the rows, and every matrix, which devices put together when they need it. Weights,
#   gradients and the optimizer's memory are divided by the number of devices (fully sharded).
# - `model` cuts heads and vocabulary. Each device computes its heads (tensor parallel).
# - `sequence` cuts positions. Each device runs its part of every sequence; a state of fixed size is
#   all that passes from one to the next, however long the parts are.


# %%
def model_parallel(**axes):
    mesh = keras.distribution.DeviceMesh(tuple(axes.values()), list(axes), devices)
    layout_map = keras_mamba2.Mamba2Backbone.get_layout_map(mesh)
    return keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")


n = len(devices)
distributions = {
    "cut batch": keras.distribution.DataParallel(devices=devices),
    "cut batch and weights": model_parallel(batch=n),
    "cut heads": model_parallel(batch=1, model=n)
    if n <= 8
    else model_parallel(batch=n // 8, model=8),
    "cut sequence": model_parallel(batch=1, sequence=n),
}
for name, distribution in distributions.items():
    with distribution.scope():
        lm = make_model()
        history = lm.fit(x, y, batch_size=BATCH_SIZE, epochs=3, verbose=0)
        losses[name] = history.history["loss"]
        text = lm.generate({"token_ids": x["token_ids"][:1, :32], "padding_mask": np.ones((1, 32))},
                           max_new_tokens=8, stop_token_ids=None)["token_ids"]  # fmt: skip
    print(f"{name:>22}: loss {losses[name][-1]:.5f}, then {np.asarray(text)[0, 32:]}")

# %% [markdown]
# ## What devices say to each other
#
# The compiled program of a gradient tells. The counts are for two layers.


# %%
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def gradient_program(distribution):
    with distribution.scope():
        lm = make_model()
        cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        def loss(trainable, non_trainable, x, y):
            return cross_entropy(y, lm.stateless_call(trainable, non_trainable, x)[0])

        def put(a):
            return jax.device_put(a, distribution.get_data_layout(a.shape).backend_layout)

        trainable, non_trainable = (
            [variable.value for variable in variables]
            for variables in (lm.trainable_variables, lm.non_trainable_variables)
        )
        gradient = jax.jit(jax.grad(loss))
        return gradient.lower(trainable, non_trainable, *jax.tree.map(put, (x, y))).compile()


collectives, memory = {}, {}
for name, distribution in distributions.items():
    program = gradient_program(distribution)
    found = re.findall(rf" ({'|'.join(KINDS)})(?:-start)?\(", program.as_text())
    collectives[name] = collections.Counter(found)
    memory[name] = program.memory_analysis()

print(f"{'':>22} " + " ".join(f"{kind:>18}" for kind in KINDS) + "   weights KB, temporaries KB")
for name, counts in collectives.items():
    sizes = (memory[name].argument_size_in_bytes, memory[name].temp_size_in_bytes)
    row = " ".join(f"{counts[kind]:>18}" for kind in KINDS)
    print(f"{name:>22} {row}   {sizes[0] / 1e3:10,.0f} {sizes[1] / 1e3:14,.0f}")

# %% [markdown]
# - **Cut batch**: the gradients are summed, all at once.
# - **Cut batch and weights**: each matrix is gathered before it is used, once for both passes, and
#   of the sum of gradients each device keeps its part.
# - **Cut heads**: the checkpoints hold gate, x, B, C and step sizes in one projection, whose parts
#   move to the devices that need them (permutes); the outputs of all heads are summed. The most
#   talk of all: for models whose layers fit no device, within one machine.
# - **Cut sequence**: the matrices are gathered. Neighbours exchange the three inputs that the
#   convolution looks back at; then a decay and a state per layer are gathered, and in the backward
#   pass reduce-scattered. The recurrence has no other dependence on what came before.
#
# ## A sequence that is too long for one device
#
# Prefill cuts in the same way. Each block of the prompt is shared by all devices.

# %%
with model_parallel(batch=1, sequence=n).scope():
    lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")
    lm.compile(sampler="greedy")
    state = lm.prefill("To be, or not to be, that is the question.\n" * 30)
    print(state, "after", int(state.length[0]), "tokens")
    print(lm.generate("ROMEO:", state=state, max_new_tokens=40))

# %% [markdown]
# ## Several machines
#
# One process runs on each, with the same code. Before anything else it joins the others, and it
# reads its own part of the data:
#
# ```python
# keras.distribution.initialize("10.0.0.1:1234", num_processes=4, process_id=i)
# distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
# with distribution.scope():
#     lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_130m_en")
#     backup = keras_mamba2.training.BackupAndRestore("/shared/backup")
#     lm.fit(texts[i::4], batch_size=8, epochs=3, callbacks=[backup])
# ```
#
# Every process must take the same number of steps. When one dies the others stop, with an error of
# JAX's that says so; started again, all of them go on after the last backup.
