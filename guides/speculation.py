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
# # More than one token for each time the weights are read
#
# To make one token, a decode step reads all weights of the model. That is what it waits for: one
# row of numbers times a matrix is done as soon as the matrix has come from memory. A few rows take
# hardly longer. So if somebody proposes the next tokens, the model can check several of them in
# about the time of one step: it reads the last token and the proposals at once, picks a token after
# each, and keeps what it would have picked anyway.
#
# The text is the same as without proposals, up to rounding, with random samplers too: every token
# is picked from the model's own probabilities, with the random numbers of its place in the text. A
# wrong proposal costs time and changes nothing.
#
# A recurrent state cannot be cut back as a cache of keys and values can. It need not be: proposals
# are read into an *open chunk*, which leaves the state as it was, and what was accepted becomes
# part of the state in one pass.

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

import matplotlib.pyplot as plt
import numpy as np

import keras_mamba2

# %% [markdown]
# ## Lookup: what followed the last time
#
# `PromptLookup` looks for the end of the text in what stands before, and proposes what followed
# there. It needs no second model. It pays where a text repeats its prompt or itself: summaries,
# code, editing, extraction, conversations about a document.

# %%
lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")
prompt = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"


def timed_text(sampler, speculation=None):
    """The text and the seconds of a call whose programs are compiled."""
    lm.compile(sampler=sampler, speculation=speculation)
    options = {"max_new_tokens": 400, "seed": 0}
    lm.generate(prompt, **options)
    start = time.perf_counter()
    return lm.generate(prompt, **options), time.perf_counter() - start


plain, seconds = timed_text("greedy")
text, faster = timed_text("greedy", keras_mamba2.PromptLookup())
print(text == plain, f"{seconds / faster:.1f} times as fast")
print(text[len(prompt) :][:300])

# %% [markdown]
# ## A draft model
#
# Where nothing repeats, a smaller model can propose: `mamba2_130m_en` for `mamba2_2.7b_en`, say.
# Here the model's own weights in int4 do. The draft draws with the same random numbers as the
# model, so that both pick the same token whenever their probabilities are alike.

# %%
draft = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")
draft.quantize("int4")
sampler = keras_mamba2.FilterSampler(temperature=0.8, top_p=0.95)
plain, _ = timed_text(sampler)
text, _ = timed_text(sampler, keras_mamba2.DraftModel(draft, num_tokens=4))
print(text == plain)

# %% [markdown]
# How often was it right? `speculate` tells.

# %%
generator = lm.make_generate_function()
rows = generator.start(lm.preprocessor.prompts([prompt]), np.array([200]), seed=0)
*_, outcome = generator.speculate(rows, num_rounds=40, num_tokens=4)
accepted, rejected = int(outcome.accepted), int(outcome.rejected)
print(f"{accepted / (accepted + rejected):.0%} of the proposals that were looked at")

# %% [markdown]
# ## When it pays
#
# A round with k proposals makes 1 + a + a^2 + ... + a^k tokens, if a proposal is right with
# probability a. It costs one step, a little for each further row, and what the draft costs. With
# `num_tokens=None`, the default, k follows the acceptance that is measured, down to none at all
# where proposals do not pay.

# %%
acceptance = np.linspace(0, 1, 100)
figure, axes = plt.subplots(figsize=(7, 4))
for k in (1, 3, 7):
    for name, cost, style in (("lookup", 0, "-"), ("draft of a tenth", 0.1, "--")):
        tokens = sum(acceptance**i for i in range(k + 1))
        round_cost = 1 + 0.08 * k + cost * (k + 1)
        axes.plot(acceptance, tokens / round_cost, style, label=f"{k} by {name}")
axes.axhline(1, color="gray", linewidth=1)
axes.set(xlabel="acceptance", ylabel="tokens/s over plain decoding")
axes.legend()

# %% [markdown]
# Proposals work in `generate`, `stream`, sessions and `chat`, and on the command line with
# `--prompt-lookup` and `--draft PRESET`. Samplers that search whole texts, such as beam search,
# have no probabilities of a next token, and are refused.
