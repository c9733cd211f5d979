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
# # Generate text with Mamba-2 in Keras
#
# A Mamba-2 model reads a text into a state of fixed size and writes on from it. This guide loads
# the small model that ships with `keras_mamba2`, generates with several samplers, continues a
# ragged batch, and looks at the state itself. It runs in a minute on a laptop; in Colab choose
# any runtime, TPU included, and run the next cell first.

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

import keras_hub
import numpy as np

import keras_mamba2

# %% [markdown]
# ## Load and generate
#
# `mamba2_tiny_shakespeare` reads and writes bytes, and was trained on a megabyte of Shakespeare.
# How tokens are picked is KerasHub's business: any of its samplers, by name or object.

# %%
lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")
lm.compile(sampler=keras_hub.samplers.TopPSampler(p=0.95, temperature=0.8, seed=1))
print(lm.generate("ROMEO:\n", max_new_tokens=300))

# %% [markdown]
# The first call compiled a few programs. Prompts are cut into blocks of fixed sizes and the decode
# loop takes its number of steps as an input, so a call with another prompt or another length
# compiles nothing new.

# %%
print(lm.generate("What light through yonder window breaks?\n", max_new_tokens=150))

# %% [markdown]
# Greedy search takes the likeliest byte each time. It is deterministic, and duller.

# %%
lm.compile(sampler="greedy")
print(lm.generate("ROMEO:\n", max_new_tokens=150))

# %% [markdown]
# ## A ragged batch
#
# Prompts of different lengths go in one batch, and each gets exactly what it gets alone.
# `strip_prompt=True` returns only what is new.

# %%
prompts = ["KING RICHARD III:\n", "O", "Enter two gentlemen, "]
together = lm.generate(prompts, max_new_tokens=40, strip_prompt=True)
alone = [lm.generate(prompt, max_new_tokens=40, strip_prompt=True) for prompt in prompts]
assert together == alone
for prompt, text in zip(prompts, together, strict=True):
    print(repr(prompt), "->", repr(text))

# %% [markdown]
# ## The state
#
# Under the hood the backbone maps tokens and a state to hidden states and the state after them.
# However many tokens went in, the state has the same size; and reading a text at once, or in two
# parts, or token by token, is the same up to rounding.

# %%
token_ids = np.array(lm.preprocessor.tokenizer(["To be, or not to be, that is the question"]))
whole, state = lm.backbone.call_with_state(token_ids)
_, half = lm.backbone.call_with_state(token_ids[:, :20])
rest, state_in_two = lm.backbone.call_with_state(token_ids[:, 20:], half)

print(state)
print(f"{state.nbytes / 1e6:.2f} MB, after {token_ids.shape[1]} bytes or after a million")
print("largest difference:", np.abs(np.array(whole[:, 20:]) - np.array(rest)).max())
