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
# # Load any Mamba-2 checkpoint, and take it out again
#
# `from_preset` reads three formats: KerasHub presets, checkpoints of transformers, and those of the
# original code (state-spaces). This guide takes a model from Keras to transformers and back, and
# ends with the same weights, bit for bit. It runs in a minute on a laptop and downloads nothing.

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
import tempfile

import numpy as np
import torch
import transformers

import keras_mamba2

# %% [markdown]
# ## In
#
# Published models load by name. The first time they are downloaded, with a progress bar, into the
# cache of `huggingface_hub`; HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean what they always mean.
#
# ```python
# lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_130m_en", dtype="bfloat16")
# lm = keras_mamba2.Mamba2CausalLM.from_preset("hf://state-spaces/mamba2-370m")
# lm = keras_mamba2.Mamba2CausalLM.from_preset("hf://AntonV/mamba2-130m-hf")
# lm = keras_mamba2.Mamba2CausalLM.from_preset("path/to/a/folder")
# ```
#
# The architecture alone needs no weights and, for most names, no network.

# %%
for name, preset in keras_mamba2.Mamba2Backbone.presets.items():
    print(f"{name:28}{preset['metadata'].get('description', 'ships with the package')}")

# %% [markdown]
# After `keras_mamba2.register()`, KerasHub's own classes find these checkpoints too:
# `keras_hub.models.CausalLM.from_preset("hf://state-spaces/mamba2-130m")`.
#
# ## Out
#
# `export_to_transformers` writes what `AutoModelForCausalLM` and `AutoTokenizer` load. Here with
# the small model that ships with the package.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")
lm.export_to_transformers(folder / "for_transformers")
print(sorted(file.name for file in (folder / "for_transformers").iterdir()))

# %%
text = "What light through yonder window breaks?"
tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "for_transformers")
model = transformers.AutoModelForCausalLM.from_pretrained(folder / "for_transformers")
batch = tokenizer(text, return_tensors="pt")
with torch.no_grad():
    theirs = model(batch["input_ids"], use_cache=False).logits.numpy()

token_ids = lm.preprocessor.tokenizer([text])
assert token_ids == batch["input_ids"].tolist()
ours = lm({"token_ids": np.array(token_ids), "padding_mask": np.ones((1, len(token_ids[0])))})
print("largest difference of the logits:", np.abs(np.asarray(ours) - theirs).max())

# %% [markdown]
# ## And back
#
# One table of names serves both directions, and every tensor must be used and every variable be
# filled. So a round trip changes nothing.

# %%
again = keras_mamba2.Mamba2CausalLM.from_preset(folder / "for_transformers")
for variable, other in zip(lm.weights, again.weights, strict=True):
    assert np.array_equal(variable.numpy(), other.numpy()), variable.path
print("the same, bit for bit:", f"{lm.count_params():,}", "weights")

# %% [markdown]
# ## From the command line
#
# ```shell
# keras-mamba2 inspect hf://state-spaces/mamba2-2.7b        # sizes, without the weights
# keras-mamba2 convert hf://state-spaces/mamba2-2.7b my_folder --dtype bfloat16
# keras-mamba2 convert my_folder for_transformers --to transformers
# ```
#
# To share a KerasHub preset: `lm.save_to_preset("my_model")`, then
# `keras_hub.upload_preset("hf://me/my_model", "my_model")`.
