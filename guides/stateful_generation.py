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
# # What a state of fixed size makes possible
#
# A Mamba-2 model keeps all that it has read in a state of a few megabytes, whether that was a
# line or a million tokens. So a state can be continued, copied, saved and sent about, and a text
# is never read twice. This guide streams, stops, forks and saves, and then reads a million
# tokens. It runs in a few minutes on a laptop.

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

import pathlib
import resource
import sys
import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np

import keras_mamba2

LONGEST = 2**20  # tokens, in the last part

lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")
lm.compile(sampler=keras_mamba2.FilterSampler(temperature=0.8, top_p=0.95))

# %% [markdown]
# ## Stream
#
# Text comes as soon as it is certain. The loop stays one compiled program, which returns to the
# host every few tokens.

# %%
for piece in lm.stream("ROMEO:\n", max_new_tokens=200, seed=1):
    print(piece, end="", flush=True)
print()

# %% [markdown]
# A stop string ends the text before it, and is never shown, not even its beginning.

# %%
print(lm.generate("ROMEO:\n", max_new_tokens=500, stop_strings="\n\n", seed=1))

# %% [markdown]
# ## Read once, continue often
#
# `prefill` reads, and returns the state after the text. `generate` and `stream` go on from it, and
# leave it as it was. With `num_return_sequences` one reading serves several continuations.

# %%
state = lm.prefill("KING RICHARD III:\nMy kingdom for a ")
print(state, f"{state.nbytes / 1e6:.1f} MB")
for text in lm.generate("", state=state, max_new_tokens=30, num_return_sequences=3, seed=2):
    print(repr(text))
print(repr(lm.generate("horse", state=state, max_new_tokens=30, seed=2)))

# %% [markdown]
# ## Sessions: text and state together
#
# A session is a text that grows. It can be forked for free, saved in a file of the state's size,
# and resumed days later, on another machine: the file knows which model it belongs to.

# %%
session = lm.start("Once upon a time")
session.generate(" there was", max_new_tokens=40, seed=3)
left, right = session.fork(2)
left.generate(max_new_tokens=60, seed=4)
right.generate(max_new_tokens=60, seed=5)
print(left.text, "\n----\n", right.text, sep="")

# %%
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "story.safetensors"
    left.save(file)
    print(f"{file.stat().st_size / 1e6:.1f} MB")
    resumed = lm.resume(file)
expected = left.generate(" And then", max_new_tokens=40, seed=6)
assert resumed.generate(" And then", max_new_tokens=40, seed=6) == expected

# %% [markdown]
# ## A million tokens
#
# A long prompt is read in blocks by the same compiled programs as a short one, so the model's
# memory stays where it was, and the next token costs what it always costs. (What grows a little at
# the end is the list of a million tokens.) Without a state one would read everything again for
# each token: that is the dotted line.

# %%
PIECE = "To be, or not to be, that is the question.\n"


def megabytes_at_most() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # of what the system counts
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


contexts = [n for n in (2**7, 2**10, 2**13, 2**16, 2**20) if n <= LONGEST]
text = PIECE * (1 + LONGEST // len(PIECE))
lm.generate(text[:1000], max_new_tokens=2)  # compiles
state, read, reading, rows = None, 0, 0.0, []
for context in contexts:
    begun = time.perf_counter()
    state = lm.prefill(text[read:context], state)
    np.asarray(state.length)  # waits until it is there
    reading, read = reading + time.perf_counter() - begun, context
    begun = time.perf_counter()
    lm.generate("", state=state, max_new_tokens=100, stop_token_ids=None)
    per_token = (time.perf_counter() - begun) / 100
    rows.append((context, 1e3 * per_token, 1e3 * reading, megabytes_at_most()))
    print(f"{context:>9,} tokens: {1e3 * per_token:.2f} ms a token, {rows[-1][3]:,.0f} MB at most")

# %%
context, per_token, again, memory = map(np.array, zip(*rows, strict=True))
figure, (left_axes, right_axes) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left_axes.plot(context, per_token, "o-", label="with the state")
left_axes.plot(context, again, "o:", color="gray", label="reading all again")
left_axes.set(xscale="log", yscale="log", xlabel="tokens before", ylabel="ms a token", title="Time")
left_axes.legend(frameon=False)
right_axes.plot(context, memory, "o-")
right_axes.set(
    xscale="log", ylim=(0, None), xlabel="tokens before", ylabel="MB at most", title="Memory"
)
plt.show()
