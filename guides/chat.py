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
# # Talk with a model
#
# A model that was trained on conversations comes with a chat template, which writes messages as
# text. `lm.chat` answers with it, and `lm.start_chat` keeps the state between turns, so that a turn
# costs what is new in it. This guide makes all of that small: a hybrid of Mamba-2, attention and
# MLPs with random weights learns a few conversations by LoRA, in a minute on a laptop, and is then
# talked with. It knows nothing else. With `from_preset` and a checkpoint that is instruction-tuned,
# the last part is all that is needed.

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

import tempfile

import keras
import tokenizers

import keras_mamba2

EPOCHS = 40

# %% [markdown]
# ## A template and its tokens
#
# Templates are Jinja. This is ChatML, which many models use: a message stands between two tokens
# that no text has, and a reply begins after `assistant`.

# %%
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

CITIES = {
    "Bern": ("Switzerland", "the Aare"),
    "Paris": ("France", "the Seine"),
    "Vienna": ("Austria", "the Danube"),
    "Rome": ("Italy", "the Tiber"),
    "London": ("England", "the Thames"),
    "Prague": ("Bohemia", "the Vltava"),
}


def conversation(city: str) -> list[dict[str, str]]:
    country, river = CITIES[city]
    turns = [
        ("user", f"Where is {city}?"),
        ("assistant", f"{city} is in {country}."),
        ("user", "On which river?"),
        ("assistant", f"On {river}."),
    ]
    return [{"role": role, "content": content} for role, content in turns]


conversations = [conversation(city) for city in CITIES]

# %% [markdown]
# The tokenizer is a byte-level one, with merges learned from these few lines.

# %%
engine = tokenizers.Tokenizer(tokenizers.models.BPE())
engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
engine.decoder = tokenizers.decoders.ByteLevel()
engine.train_from_iterator(
    [message["content"] for messages in conversations for message in messages],
    tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_end|>", "<|im_start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
tokenizer = keras_mamba2.Mamba2Tokenizer(
    tokenizer=engine, start_token=None, end_token="<|im_end|>", chat_template=CHATML
)
texts = [tokenizer.chat_template.render(messages) for messages in conversations]
print(texts[0])

# %% [markdown]
# ## A tiny hybrid
#
# `blocks` says what stands where, as in the checkpoints of Granite 4.0 H or Nemotron-H.

# %%
keras.utils.set_random_seed(0)
backbone = keras_mamba2.Mamba2HybridBackbone(
    vocabulary_size=tokenizer.num_ids,
    hidden_dim=128,
    logits_multiplier=8.0,  # random embeddings are small, and LoRA leaves them so
    blocks=["mamba2", "mlp", "attention", "mlp", "mamba2", "mlp"],
    sublayers={
        "mamba2": {"state_dim": 16, "head_dim": 32},
        "attention": {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        "mlp": {"intermediate_dim": 256},
    },
)
lm = keras_mamba2.Mamba2CausalLM(
    backbone,
    keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, sequence_length=80, add_end_token=False),
)
print(lm.chat(conversations[0][:1], max_new_tokens=12))

# %% [markdown]
# ## LoRA on conversations
#
# The adapters stand beside all projections: those of the mixers, of attention and of the MLPs. The
# random weights stay as they are.

# %%
lm.backbone.enable_lora(16)
lm.compile(
    optimizer=keras_mamba2.training.adamw_recipe(2e-2, steps=EPOCHS * 2),
    weighted_metrics=[],
)
history = lm.fit(texts, batch_size=3, epochs=EPOCHS, verbose=0)
print(f"loss {history.history['loss'][0]:.2f} -> {history.history['loss'][-1]:.3f}")

# %% [markdown]
# ## Chat
#
# The second question can only be answered by who remembers the first. `usage` tells that it was not
# read again: only what is new of the conversation was.

# %%
chat = lm.start_chat(max_new_tokens=30)
for question in ("Where is Vienna?", "On which river?"):
    print("user:", question)
    print("assistant: ", end="")
    for piece in chat.stream(question):
        print(piece, end="", flush=True)
    usage = chat.usage
    print(f"\n  {usage.prompt_tokens} tokens, {usage.cached_tokens} of them remembered")

# %% [markdown]
# Turns can be taken back, and a conversation can be copied and go on in two ways. Neither reads
# anything again: states are small, and never change.

# %%
chat.undo()
chat.undo()
other = chat.fork()
print(chat.send("Where is Rome?"), chat.send("On which river?"))
print(other.send("Where is Bern?"), other.send("On which river?"))

# %% [markdown]
# A file keeps messages and state. All of the conversation, read anew, gives the same reply.

# %%
folder = tempfile.TemporaryDirectory()
chat.undo()
chat.save(f"{folder.name}/chat.safetensors")
again = lm.resume_chat(f"{folder.name}/chat.safetensors", max_new_tokens=30)
reply = again.send("On which river?")
assert reply == lm.chat(again.messages[:-1], max_new_tokens=30)
print(f"{len(again.messages)} messages; the last: {reply}")

# %% [markdown]
# With the adapters made part of the weights, the model is a preset like any other, the template in
# it. In a terminal, `keras-mamba2 chat my_folder` talks with it.

# %%
lm.backbone.merge_lora()
lm.save_to_preset(f"{folder.name}/cities")
loaded = keras_mamba2.Mamba2CausalLM.from_preset(f"{folder.name}/cities")
print(loaded.chat([{"role": "user", "content": "Where is London?"}], max_new_tokens=30))
folder.cleanup()
