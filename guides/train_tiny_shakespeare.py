"""Trains the preset `mamba2_tiny_shakespeare` that ships with the package.

    python guides/train_tiny_shakespeare.py input.txt runs/tiny

`input.txt` is the tiny Shakespeare corpus of karpathy/char-rnn. The first 90 % of its characters
are for training, the last 10 % for validation. Interrupted, the same command goes on where the
last epoch ended. The preset with its card and a picture of the loss goes to the second argument.

On CPU most of a step can go to page faults, since XLA returns its memory to the system after each:
with tcmalloc (LD_PRELOAD=libtcmalloc_minimal.so.4 TCMALLOC_RELEASE_RATE=0) it is twice as fast.
"""

import argparse
import csv
import math
import os
import pathlib
import re

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
VALIDATION_WINDOW = 1024
BEST_WEIGHTS = "best.weights.h5"
HISTORY = "history.csv"

CARD = """# {preset}

A byte-level Mamba-2 language model that writes Shakespeare. It ships with `keras_mamba2`, for
trying things out, for tests and for guides; it knows nothing but these plays.

| | |
| --- | --- |
| data | tiny Shakespeare (karpathy/char-rnn, public domain): first 90 % of the characters |
| parameters | {parameters:,} |
| vocabulary | 256 bytes and an end token, no merges |
| training | {steps} steps of {batch_size} windows of {window} characters, {tokens:.1f}M in all; \
in {renamed:.0%} of the windows the speakers have invented names |
| recipe | AdamW, peak learning rate {learning_rate}, warm-up, cosine to a tenth, weight decay \
{weight_decay} on matrices only, clipping at 1, dropout {dropout}, averaged weights; of {planned} \
planned steps those until validation stopped improving |
| calibration | all logits divided by {temperature:.2f}, the best for the first half of the \
validation text, since a model that has read so little so often is too sure of itself |
| validation loss | **{loss:.4f} nats a character** on the whole last 10 %, state carried \
({uncalibrated:.4f} before calibration) |
| for comparison | nanoGPT, 10.7M parameters on a GPU: 1.4697; its CPU setting: 1.88 |
| speakers | one that a text has not named yet is often invented, as in training |
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
    parser.add_argument("--epochs", type=int, default=24, help="of 100 steps, at most")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024, help="characters a row")
    parser.add_argument("--learning-rate", type=float, default=3.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--renamed", type=float, default=0.7, help="windows with other speakers")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--machine", default="not recorded", help="what the card says of it")
    return parser.parse_args()


class RandomWindows:
    """Draws batches of windows of a text; a step of an epoch always draws the same.

    In `renamed` of the windows the speakers have other names. The plays that a model is validated
    on have speakers that it never met, so it should learn whose turn it is from the dialogue
    itself, not a list of names by heart.
    """

    def __init__(self, text: str, window: int, batch_size: int, renamed: float):
        self.text, self.window, self.batch_size, self.epoch = text, window, batch_size, 0
        self.renamed, self.names = renamed, Names(text)

    def __call__(self, step: int):
        rng = np.random.default_rng([self.epoch, step])
        starts = rng.integers(len(self.text) - 2 * self.window, size=self.batch_size)
        return inputs_and_targets(np.stack([self.row(start, rng) for start in starts]))

    def row(self, start: int, rng: np.random.Generator) -> np.ndarray:
        text = self.text[start : start + 2 * self.window]  # other names may be shorter
        if rng.random() < self.renamed:
            text = self.names.replace(text, rng)
        return bytes_of(text[: self.window + 1])


class Names:
    """The speakers of plays, and new names made of the halves of theirs."""

    SPEAKER = re.compile(r"(?<=\n\n)[A-Z][A-Za-z ]*(?=:\n)")

    def __init__(self, text: str):
        self.words = sorted({w for name in self.SPEAKER.findall(text) for w in name.split()})

    def replace(self, text: str, rng: np.random.Generator) -> str:
        """`text` with another name for each speaker, also where others speak of them."""
        new = {name: self.invent(name, rng) for name in dict.fromkeys(self.SPEAKER.findall(text))}
        text = self.SPEAKER.sub(lambda match: new[match[0]], text)
        mentions = {n.title(): new[n].title() for n in new if n.isupper() and " " not in n}
        if not mentions:
            return text
        any_mention = re.compile(rf"\b({'|'.join(mentions)})\b")
        return any_mention.sub(lambda match: mentions[match[0]], text)

    def invent(self, name: str, rng: np.random.Generator) -> str:
        halves = (
            words[len(words) // 2 :] if last else words[: (len(words) + 1) // 2]
            for last, words in enumerate(rng.choice(self.words, 2))
        )
        word = "".join(halves).upper()
        return word if name.isupper() else word.title()


def bytes_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), "uint8").astype("int32")


def inputs_and_targets(rows: np.ndarray):
    token_ids = rows[:, :-1]
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}, rows[:, 1:]


def consecutive_windows(text_ids: np.ndarray, window: int):
    count = (len(text_ids) - 1) // window
    starts = np.arange(count)[:, None] * window
    return inputs_and_targets(text_ids[starts + np.arange(window + 1)])


def callbacks(windows: RandomWindows, output: pathlib.Path) -> list[keras.callbacks.Callback]:
    return [
        keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: setattr(windows, "epoch", epoch)
        ),
        # Before the averaged weights are swapped in, so that training resumes from its own.
        keras.callbacks.BackupAndRestore(output / "backup", delete_checkpoint=False),
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras.callbacks.ModelCheckpoint(
            output / BEST_WEIGHTS,
            monitor="val_loss",
            save_best_only=True,
            save_weights_only=True,
        ),
        keras.callbacks.CSVLogger(output / HISTORY, append=True),
        # From there on it learns the training text by heart.
        keras.callbacks.EarlyStopping(patience=2),
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
        steps, [float(row["val_loss"]) for row in history], label="validation, averaged weights"
    )
    axes.axhline(
        1.4697, color="gray", linewidth=1, linestyle=":", label="nanoGPT, 10.7M parameters"
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


def save_preset(lm, arguments, history, sample: str, **figures: float) -> None:
    folder = arguments.output / PRESET
    lm.save_to_preset(folder)
    plot(history, folder / "loss.png")
    losses = [float(row["val_loss"]) for row in history]
    steps = STEPS_PER_EPOCH * (1 + losses.index(min(losses)))
    tokens = steps * arguments.batch_size * arguments.window
    card = CARD.format(
        preset=PRESET,
        parameters=lm.count_params(),
        steps=steps,
        planned=arguments.epochs * STEPS_PER_EPOCH,
        renamed=arguments.renamed,
        batch_size=arguments.batch_size,
        window=arguments.window,
        tokens=tokens / 1e6,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        dropout=arguments.dropout,
        **figures,
        machine=arguments.machine,
        sample="\n".join("    " + line for line in sample.splitlines()),
    )
    (folder / "README.md").write_text(card)
    print(card)


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    text = arguments.text.read_text()
    split = int(0.9 * len(text))
    windows = RandomWindows(text[:split], arguments.window, arguments.batch_size, arguments.renamed)
    lm = make_model(arguments)
    lm.summary()
    lm.fit(
        grain.MapDataset.range(STEPS_PER_EPOCH).map(windows),
        epochs=arguments.epochs,
        validation_data=consecutive_windows(bytes_of(text[split:]), VALIDATION_WINDOW),
        validation_batch_size=12,
        callbacks=callbacks(windows, arguments.output),
    )

    lm.load_weights(arguments.output / BEST_WEIGHTS)
    with (arguments.output / HISTORY).open() as file:
        history = list(csv.DictReader(file))
    tokenizer = keras_mamba2.Mamba2Tokenizer(byte_vocabulary("<|endoftext|>"), [])
    lm = keras_mamba2.Mamba2CausalLM(
        lm.backbone, keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer)
    )
    # Over the whole text, the state carried from its start to its end.
    uncalibrated = math.log(lm.perplexity(text[split:]))
    temperature = calibrate(lm, text[split : (split + len(text)) // 2])
    lm.compile(sampler=keras_hub.samplers.TopPSampler(p=0.95, temperature=0.8, seed=1))
    sample = lm.generate("ROMEO:\n", max_new_tokens=500)
    save_preset(
        *(lm, arguments, history, sample),
        uncalibrated=uncalibrated,
        temperature=temperature,
        loss=math.log(lm.perplexity(text[split:])),
    )


if __name__ == "__main__":
    main()
