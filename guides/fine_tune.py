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
# # Fine-tune Mamba-2 in Keras
#
# A model that knows nothing but Shakespeare learns to write recipes: first all of its weights, then
# only adapters beside them (LoRA). On the way: documents packed into rows, reduced precision and
# several devices where there are any, a training that survives being killed, and what is forgotten.
# It takes a few minutes on a laptop; in Colab choose any runtime, TPU included, and run the next
# cell first.

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

import keras
import keras_hub
import numpy as np

import keras_mamba2

PRESET = "mamba2_tiny_shakespeare"
NUM_RECIPES, NUM_VALIDATION, EPOCHS, BATCH_SIZE = 600, 50, 2, 8
FOLDER = pathlib.Path("fine_tuned")

# %% [markdown]
# ## The device
#
# TPUs and GPUs are fast in bfloat16: under `mixed_bfloat16` the weights stay float32, matrices are
# multiplied in bfloat16, and the recurrence keeps its state in float32. CPUs gain nothing from it.
# Of several devices, each gets its share of every batch.

# %%
keras.utils.set_random_seed(0)
devices = keras.distribution.list_devices()
dtype = "float32" if devices[0].startswith("cpu") else "mixed_bfloat16"
if len(devices) > 1:
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
print(f"{', '.join(devices)}: {dtype}")

# %% [markdown]
# ## Another style
#
# Six hundred recipes, all of them made here, none of them tried. Fifty more are for validation.

# %%
THINGS = ["plum", "apple", "onion", "leek", "pear", "turnip", "quince", "carrot", "chestnut", "fig"]
DISHES = ["cake", "pie", "soup", "pudding", "stew", "tart", "broth", "dumpling"]
STAPLES = ["flour", "butter", "honey", "oats", "cream", "barley", "sugar", "milk", "cheese"]
SPICES = ["salt", "pepper", "nutmeg", "ginger", "cloves", "mustard", "cinnamon", "thyme"]
CUTS = ["Chop", "Slice", "Peel and slice", "Mash", "Grate"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "twelve"]
MEASURES = ["a cup", "two cups", "half a pound", "three spoons"]
HEATS = ["Bake in a hot oven", "Boil over a low fire, stirring now and then,", "Fry in a deep pan"]
TIMES = ["ten minutes", "twenty minutes", "half an hour", "an hour"]


def recipe(rng: np.random.Generator) -> str:
    pick = rng.choice
    thing, spice = pick(THINGS), pick(SPICES)
    first, second, third = pick(STAPLES, 3, replace=False)
    sentences = [
        f"Take {pick(NUMBERS)} {thing}s, {pick(MEASURES)} of {first}, {pick(MEASURES)} of {second} "
        f"and a pinch of {spice}.\n",
        f"{pick(CUTS)} the {thing}s.",
        f"Stir the {first} into the {second}, and add the {spice}.",
        f"Let it rest for {pick(TIMES)}.",
        f"{pick(HEATS)} for {pick(TIMES)}.\n",
        f"Serve warm, with {third}.",
        f"It keeps for {pick(NUMBERS)} days.",
    ]
    optional = {i for i in (3, 5, 6) if rng.random() < 0.5}
    steps = [sentence for i, sentence in enumerate(sentences) if i not in optional]
    return f"{thing.upper()} {pick(DISHES).upper()}\n\n{' '.join(steps)}\n".replace("\n ", "\n")


rng = np.random.default_rng(0)
recipes = [recipe(rng) for _ in range(NUM_RECIPES)]
validation = [recipe(rng) for _ in range(NUM_VALIDATION)]
print(recipes[0])

# %% [markdown]
# To see what is forgotten: two passages from plays that the model has never seen. Shakespeare is
# what it knows, so it guesses these rather well.

# %%
SHAKESPEARE = [
    """MACBETH:
She should have died hereafter;
There would have been a time for such a word.
To-morrow, and to-morrow, and to-morrow,
Creeps in this petty pace from day to day,
To the last syllable of recorded time;
And all our yesterdays have lighted fools
The way to dusty death. Out, out, brief candle!
Life's but a walking shadow, a poor player,
That struts and frets his hour upon the stage,
And then is heard no more: it is a tale
Told by an idiot, full of sound and fury,
Signifying nothing.
""",
    """JAQUES:
All the world's a stage,
And all the men and women merely players:
They have their exits and their entrances;
And one man in his time plays many parts,
His acts being seven ages. At first, the infant,
Mewling and puking in the nurse's arms.
Then the whining schoolboy, with his satchel
And shining morning face, creeping like snail
Unwillingly to school.
""",
]

# %% [markdown]
# ## Rows without waste
#
# A preprocessor that packs puts several recipes into a row, and numbers them in `segment_ids`.
# The model starts afresh at every number, so each recipe is learned as if it were alone. Rows that
# do not fill a batch are left out, for devices share batches evenly.

# %%
preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor.from_preset(
    PRESET, sequence_length=512, packing=True
)


def whole_batches(texts: list[str]):
    rows = preprocessor(texts)
    count = len(rows[1]) // BATCH_SIZE * BATCH_SIZE
    return keras.tree.map_structure(lambda array: array[:count], rows)


x, y, sample_weight = whole_batches(recipes)
val_rows = whole_batches(validation)
print(f"{len(y)} rows with up to {x['segment_ids'].max()} recipes; {sample_weight.mean():.1%} used")

# %% [markdown]
# ## Before
#
# `adamw_recipe` is the optimizer that Mamba-2 models are trained with: warm-up, cosine, clipping,
# and weight decay where it belongs.

# %%
PROMPT = "APPLE PUDDING\n"
results = {}


def load(learning_rate: float, lora_rank: int | None = None) -> keras_mamba2.Mamba2CausalLM:
    lm = keras_mamba2.Mamba2CausalLM.from_preset(PRESET, preprocessor=preprocessor, dtype=dtype)
    if lora_rank is not None:
        lm.backbone.enable_lora(lora_rank)
    steps = EPOCHS * len(y) // BATCH_SIZE
    lm.compile(
        optimizer=keras_mamba2.training.adamw_recipe(learning_rate, steps=steps),
        weighted_metrics=[],
        sampler=keras_hub.samplers.TopPSampler(p=0.95, temperature=0.7),
    )
    return lm


def perplexity(lm: keras_mamba2.Mamba2CausalLM, texts: list[str]) -> float:
    """Of a byte: 1 is to know which comes next, 256 is to know nothing."""
    return float(np.exp(np.mean(np.log(lm.perplexity(texts)))))


def report(name: str, lm: keras_mamba2.Mamba2CausalLM, num_trained: int) -> None:
    results[name] = (num_trained, perplexity(lm, validation), perplexity(lm, SHAKESPEARE))
    print(lm.generate(PROMPT, max_new_tokens=250, seed=1))


lm = load(learning_rate=1e-3)
report("before", lm, 0)

# %% [markdown]
# ## Fine-tune all of it
#
# Keras shows how far it is. The callbacks are for what can go wrong.
#
# - **The process dies.** `BackupAndRestore` keeps what there is after every epoch; run the same
#   program again, and it repeats the epoch that was cut short. `SeedByEpoch` adds what Keras does
#   not keep, the random numbers of dropout. So the weights at the end are those, to the last bit,
#   of a run that nobody disturbed.
# - **The loss becomes NaN.** `TerminateOnNaN(raise_error=True)` stops before anything broken is
#   backed up (without `raise_error`, the backup is overwritten, then deleted). Give `adamw_recipe`
#   a smaller learning rate or more `warmup_steps` and run again: it goes on from the last good
#   epoch. With `float16`, try `bfloat16`. Token ids and targets are no suspects: `fit` checks them.


# %%
def train(lm: keras_mamba2.Mamba2CausalLM, backup: str) -> int:
    """Returns the number of parameters that were trained."""
    lm.fit(
        x,
        y,
        sample_weight=sample_weight,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        validation_data=val_rows,
        callbacks=[
            keras_mamba2.training.SeedByEpoch(),
            keras_mamba2.training.BackupAndRestore(FOLDER / backup),
            keras.callbacks.TerminateOnNaN(raise_error=True),
        ],
    )
    return sum(int(np.prod(variable.shape)) for variable in lm.trainable_variables)


report("all weights", lm, train(lm, "backup"))

# %% [markdown]
# A preset keeps the model and its tokenizer in a folder. It loads by the folder's name, also as
# `keras_hub.models.CausalLM`, on any device and in any precision.

# %%
lm.save_to_preset(FOLDER / "recipes")
again = keras_mamba2.Mamba2CausalLM.from_preset(FOLDER / "recipes")
assert all(map(np.array_equal, again.get_weights(), lm.get_weights()))

# %% [markdown]
# ## LoRA
#
# Beside the projections into and out of each block, LoRA trains two thin matrices, and leaves all
# else as it was. It takes a larger learning rate. The optimizer keeps its two numbers for a few
# parameters only, and the file with the adapters is small: one model, many styles.
#
# What stays as it was includes the embedding, and in it the end token, which no play of Shakespeare
# had. So these recipes may not know where to end.

# %%
lora = load(learning_rate=5e-3, lora_rank=8)
report("LoRA", lora, train(lora, "lora_backup"))

# %%
adapters = FOLDER / "recipes.lora.h5"
lora.backbone.save_lora_weights(adapters)
again = keras_mamba2.Mamba2CausalLM.from_preset(PRESET)
again.backbone.load_lora_weights(adapters)
assert all(map(np.array_equal, again.get_weights(), lora.get_weights()))
whole = FOLDER / "recipes" / "model.weights.h5"
print(f"{adapters.stat().st_size / 1e6:.1f} MB instead of {whole.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# ## What was learned, and what was forgotten

# %%
print(f"{'':<12} {'parameters trained':>18} {'recipes':>8} {'Shakespeare':>12}")
for name, (num_trained, of_recipes, of_shakespeare) in results.items():
    print(f"{name:<12} {num_trained:>18,} {of_recipes:>8.2f} {of_shakespeare:>12.2f}")

# %% [markdown]
# ## Longer trainings
#
# Where an epoch takes hours, call a stretch of steps an epoch. `save_freq` of `BackupAndRestore`
# would not do: it brings back the weights of the middle of an epoch, and then begins the epoch
# again, so that some of the data are seen twice. A `grain` dataset knows every batch by its number,
# shuffled as it may be, so that it can begin where the backup was made. Its batches are those
# of the rows that are packed already; of texts, `fit` would pack others:
#
# ```python
# arrays = (x, y, sample_weight)
# rows = [keras.tree.map_structure(lambda array: array[i], arrays) for i in range(len(y))]
# batches = grain.MapDataset.source(rows).seed(0).shuffle().repeat(3).batch(8)
# steps = min(100, len(batches))  # and then a backup
# backup = keras_mamba2.training.BackupAndRestore("backup")
# done = keras_mamba2.training.restore(lm, backup)  # 0 in the first run
# if done < len(batches):
#     lm.fit(
#         batches[done:],
#         steps_per_epoch=steps,
#         epochs=len(batches) // steps,
#         callbacks=[keras_mamba2.training.SeedByEpoch(), backup],
#     )
# else:  # it was killed when all was done, but for the removal of its backup
#     backup.on_train_end()
# ```
#
# Where the gradients of a batch take too much memory, `gradient_accumulation_steps=4` of
# `adamw_recipe` sums them over four smaller batches, and only then clips them and takes a step.
# Under the policy `bfloat16`, where weights are bfloat16 too, keep to the recipe: the
# `beta_2=0.999` that Keras' Adam has by default is 1 in bfloat16, and moves nothing.
