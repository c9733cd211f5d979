"""Trains the preset `mamba2_tiny_shakespeare` that ships with the package.

    python guides/train_tiny_shakespeare.py input.txt runs/tiny

`input.txt` is the tiny Shakespeare corpus of karpathy/char-rnn. The last 10 % of its characters are
for validation: they are read once, at the very end, for the figure on the card. Everything that is
chosen on text (when to stop, the temperature of the logits) is chosen on a part of the first 90 %
that training leaves out. Interrupted, the same command goes on where the last epoch ended. The
preset with its card and a picture of the loss goes to the second argument.

On CPU most of a step can go to page faults, since XLA returns its memory to the system after each:
with tcmalloc (LD_PRELOAD=libtcmalloc_minimal.so.4 TCMALLOC_RELEASE_RATE=0) it is twice as fast.
"""

import argparse
import csv
import math
import os
import pathlib
import re
from collections.abc import Callable

os.environ.setdefault("KERAS_BACKEND", "jax")

import grain
import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np

import keras_mamba2
from keras_mamba2.models.mamba2_tokenizer import byte_vocabulary

PRESET = "mamba2_tiny_shakespeare"
STEPS_PER_EPOCH = 100
SPLIT = 0.9  # the rest is for the one final measurement
HELD_OUT = (0.82, 0.865)  # half of a play, whose other half is trained on
EVALUATION_WINDOW = 1024
PAGES, PAGE_LENGTH = 50, 1000
PATIENCE = 3  # epochs without a better loss; from there on it learns the training text by heart
BEST_WEIGHTS = "best.weights.h5"
HISTORY = "history.csv"

CARD = """---
language: en
library_name: keras-hub
license: apache-2.0
pipeline_tag: text-generation
tags:
- mamba2
- keras_mamba2
---

# {preset}

A byte-level Mamba-2 language model that writes Shakespeare. It ships with `keras_mamba2`, for
trying things out, for tests and for guides; it knows nothing but these plays.

| | |
| --- | --- |
| data | tiny Shakespeare (karpathy/char-rnn, public domain): the first 90 % of the \
characters without {held_out_characters:,} that are held out |
| parameters | {parameters:,} |
| vocabulary | 256 bytes and an end token, no merges |
| training | {steps} steps of {batch_size} windows of {window} characters, {tokens:.1f}M in all; \
in {exchanged:.0%} of the windows the speakers have names from other plays, in {invented:.0%} \
invented ones |
| recipe | AdamW, peak learning rate {learning_rate}, warm-up, cosine to a tenth, weight decay \
{weight_decay} on matrices only, clipping at 1, dropout {dropout}, averaged weights; of {planned} \
planned steps those that were best on the held-out part |
| calibration | all logits divided by {temperature:.2f}, the best for the held-out part, since a \
model that has read so little so often is too sure of itself |
| validation loss | **{loss:.4f} nats a character** on the whole last 10 %, state carried; \
this text was read once, for this figure |
| for comparison | nanoGPT, 10.7M parameters on a GPU: 1.4697; its CPU setting: 1.88 |
| speakers | {real_speakers:.0%} of those in {pages} sampled pages of {page_length} characters \
have a name that occurs in the plays |
| machine | {machine} |
| made by | `guides/train_tiny_shakespeare.py` |

![loss](loss.png)

A sample, at temperature 0.8 and top-p 0.95:

{sample}
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--epochs", type=int, default=13, help="of 100 steps, at most")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024, help="characters a row")
    parser.add_argument("--learning-rate", type=float, default=3.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--exchanged", type=float, default=0.65, help="windows with other speakers")
    parser.add_argument("--invented", type=float, default=0.05, help="windows with new names")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--machine", default="not recorded", help="what the card says of it")
    return parser.parse_args()


class RandomWindows:
    """Draws batches of windows of texts; a step of an epoch always draws the same.

    In some windows the speakers have other names. The plays that a model is validated on have
    speakers that it never met, so it should learn whose turn it is from the dialogue itself. Nearly
    all of the other names are those of other plays: a model that reads invented ones invents some.
    """

    def __init__(self, texts: list[str], arguments: argparse.Namespace):
        self.texts, self.names, self.epoch = texts, Names("\n\n".join(texts)), 0
        self.window, self.batch_size = arguments.window, arguments.batch_size
        self.shares = arguments.exchanged, arguments.invented

    def __call__(self, step: int):
        rng = np.random.default_rng([self.epoch, step])
        return inputs_and_targets(np.stack([self.row(rng) for _ in range(self.batch_size)]))

    def row(self, rng: np.random.Generator) -> np.ndarray:
        length = 2 * self.window  # other names may be shorter
        starts = np.array([len(text) - length for text in self.texts])
        text = self.texts[rng.choice(len(starts), p=starts / starts.sum())]
        start = rng.integers(len(text) - length)
        text = text[start : start + length]
        exchanged, invented = self.shares
        draw = rng.random()
        if draw < exchanged:
            text = rename(text, lambda speakers: self.names.exchange(speakers, rng))
        elif draw < exchanged + invented:
            text = rename(text, lambda speakers: self.names.invent(speakers, rng))
        return bytes_of(text[: self.window + 1])


SPEAKER = re.compile(r"(?<=\n\n)[A-Z][A-Za-z ]*(?=:\n)")


class Names:
    """Other names for the speakers of a play."""

    def __init__(self, text: str):
        self.speakers = sorted(set(SPEAKER.findall(text)))
        self.words = sorted({word for name in self.speakers for word in name.split()})

    def exchange(self, speakers: list[str], rng: np.random.Generator) -> dict[str, str]:
        """For each speaker another one's name: a proper name (in capitals), or a role."""
        new = {}
        for proper in (True, False):
            old = [name for name in speakers if name.isupper() == proper]
            names = [name for name in self.speakers if name.isupper() == proper]
            new |= dict(zip(old, rng.permutation(names).tolist(), strict=False))
        return new

    def invent(self, speakers: list[str], rng: np.random.Generator) -> dict[str, str]:
        """For each speaker a name made of the halves of two words of names."""
        new = {}
        for name in speakers:
            first, last = rng.choice(self.words, 2)
            word = first[: (len(first) + 1) // 2] + last[len(last) // 2 :]
            new[name] = word.upper() if name.isupper() else word.title()
        return new


def rename(text: str, other_names: Callable[[list[str]], dict[str, str]]) -> str:
    """`text` with another name for each speaker, also where others speak of them."""
    new = other_names(list(dict.fromkeys(SPEAKER.findall(text))))
    text = SPEAKER.sub(lambda match: new[match[0]], text)
    mentions = {n.title(): new[n].title() for n in new if n.isupper() and " " not in n}
    if not mentions:
        return text
    any_mention = re.compile(rf"\b({'|'.join(mentions)})\b")
    return any_mention.sub(lambda match: mentions[match[0]], text)


def share_of_real_speakers(pages: list[str], plays: str) -> float:
    speakers = [name for page in pages for name in SPEAKER.findall(page)]
    real = set(SPEAKER.findall("\n\n" + plays))
    return sum(name in real for name in speakers) / len(speakers)


def bytes_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), "uint8").astype("int32")


def inputs_and_targets(rows: np.ndarray):
    token_ids = rows[:, :-1]
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}, rows[:, 1:]


def consecutive_windows(text_ids: np.ndarray, window: int):
    count = (len(text_ids) - 1) // window
    starts = np.arange(count)[:, None] * window
    return inputs_and_targets(text_ids[starts + np.arange(window + 1)])


def history_of(output: pathlib.Path) -> list[dict[str, str]]:
    """What is known of the epochs so far, also of runs that were interrupted."""
    file = output / HISTORY
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def losses_of(history: list[dict[str, str]]) -> list[float]:
    return [float(row["val_loss"]) for row in history]


def epochs_since_best(losses: list[float]) -> int:
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class EarlyStopping(keras.callbacks.EarlyStopping):
    """Keras' own, which goes on counting where an interrupted run was."""

    def __init__(self, losses: list[float]):
        super().__init__(patience=PATIENCE)
        self._losses = losses

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.best = min(self._losses, default=None)
        self.wait = epochs_since_best(self._losses)


def callbacks(windows: RandomWindows, output: pathlib.Path) -> list[keras.callbacks.Callback]:
    losses = losses_of(history_of(output))
    return [
        keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: setattr(windows, "epoch", epoch)
        ),
        # Before the averaged weights are swapped in, so that training resumes from its own.
        keras_mamba2.training.BackupAndRestore(output / "backup", delete_checkpoint=False),
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras.callbacks.ModelCheckpoint(
            output / BEST_WEIGHTS,
            monitor="val_loss",
            save_best_only=True,
            save_weights_only=True,
            initial_value_threshold=min(losses, default=None),
        ),
        keras.callbacks.CSVLogger(output / HISTORY, append=True),
        EarlyStopping(losses),
    ]


def make_model(arguments: argparse.Namespace) -> keras_mamba2.Mamba2CausalLM:
    backbone = keras_mamba2.Mamba2Backbone(
        vocabulary_size=257,
        num_layers=6,
        hidden_dim=192,
        state_dim=128,
        head_dim=32,
        dropout=arguments.dropout,
    )
    optimizer = keras_mamba2.training.adamw_recipe(
        arguments.learning_rate,
        steps=arguments.epochs * STEPS_PER_EPOCH,
        warmup_steps=100,
        weight_decay=arguments.weight_decay,
        use_ema=True,
        ema_momentum=0.99,
    )
    lm = keras_mamba2.Mamba2CausalLM(backbone)
    lm.compile(optimizer=optimizer, weighted_metrics=[])
    return lm


def plot(history: list[dict[str, str]], path: pathlib.Path) -> None:
    steps = STEPS_PER_EPOCH * (1 + np.arange(len(history)))
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(steps, [float(row["loss"]) for row in history], label="training")
    axes.plot(
        steps, [float(row["val_loss"]) for row in history], label="held out, averaged weights"
    )
    axes.axhline(
        1.4697,
        color="gray",
        linewidth=1,
        linestyle=":",
        label="nanoGPT, validation",
    )
    axes.set(xlabel="step", ylabel="nats a character", ylim=(1.2, 1.8))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def calibrate(lm: keras_mamba2.Mamba2CausalLM, text: str) -> float:
    """Divides all logits by the temperature that suits `text` best, and returns it.

    A model that has seen a small text several times is too sure of itself. The last norm takes the
    temperature, so that it is a part of the weights.
    """
    token_ids = bytes_of(text)[None]
    logits = lm.score(token_ids[:, :-1])[0]
    losses = {
        t: float(
            keras.ops.mean(
                keras.losses.sparse_categorical_crossentropy(
                    token_ids[0, 1:], logits / t, from_logits=True
                )
            )
        )
        for t in np.arange(1, 1.5, 0.01)
    }
    temperature = min(losses, key=losses.__getitem__)
    scale = lm.backbone.norm.scale
    scale.assign(scale / temperature)
    return temperature


def save_preset(lm, arguments, history, pages: list[str], **figures: float) -> None:
    folder = arguments.output / PRESET
    lm.save_to_preset(folder)
    plot(history, folder / "loss.png")
    steps = STEPS_PER_EPOCH * (len(history) - epochs_since_best(losses_of(history)))
    tokens = steps * arguments.batch_size * arguments.window
    card = CARD.format(
        **vars(arguments),
        **figures,
        preset=PRESET,
        parameters=lm.count_params(),
        steps=steps,
        planned=arguments.epochs * STEPS_PER_EPOCH,
        tokens=tokens / 1e6,
        pages=PAGES,
        page_length=PAGE_LENGTH,
        sample="\n".join("    " + line for line in pages[0][:500].splitlines()),
    )
    (folder / "README.md").write_text(card)
    print(card)


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    text = arguments.text.read_text()
    first, last, split = (int(share * len(text)) for share in (*HELD_OUT, SPLIT))
    held_out = text[first:last]
    windows = RandomWindows([text[:first], text[last:split]], arguments)
    lm = make_model(arguments)
    lm.summary()
    if epochs_since_best(losses_of(history_of(arguments.output))) < PATIENCE:
        lm.fit(
            grain.MapDataset.range(STEPS_PER_EPOCH).map(windows),
            epochs=arguments.epochs,
            validation_data=consecutive_windows(bytes_of(held_out), EVALUATION_WINDOW),
            validation_batch_size=12,
            callbacks=callbacks(windows, arguments.output),
        )

    lm.load_weights(arguments.output / BEST_WEIGHTS)
    history = history_of(arguments.output)
    tokenizer = keras_mamba2.Mamba2Tokenizer(byte_vocabulary("<|endoftext|>"), [])
    lm = keras_mamba2.Mamba2CausalLM(
        lm.backbone, keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer)
    )
    temperature = calibrate(lm, held_out)
    lm.compile(sampler=keras_hub.samplers.TopPSampler(p=0.95, temperature=0.8, seed=1))
    pages = lm.generate(["ROMEO:\n"] * PAGES, max_new_tokens=PAGE_LENGTH, stop_token_ids=None)
    save_preset(
        *(lm, arguments, history, pages),
        held_out_characters=len(held_out),
        temperature=temperature,
        real_speakers=share_of_real_speakers(pages, text[:split]),
        # Over the whole text, the state carried from its start to its end.
        loss=math.log(lm.perplexity(text[split:])),
    )


if __name__ == "__main__":
    main()
