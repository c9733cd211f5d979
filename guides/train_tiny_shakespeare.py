"""Trains the preset `mamba2_tiny_shakespeare` that ships with the package.

    python guides/train_tiny_shakespeare.py input.txt runs/tiny

`input.txt` is the tiny Shakespeare corpus of karpathy/char-rnn. The first 90 % of its characters
are for training, the last 10 % for validation. Interrupted, the same command goes on where the
last epoch ended. The preset, the history and a picture of the loss go to the second argument.
"""

import argparse
import json
import os
import pathlib
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import grain
import keras
import numpy as np

import keras_mamba2

STEPS_PER_EPOCH = 100
VALIDATION_WINDOW = 1024


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--epochs", type=int, default=26, help="of 100 steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--window", type=int, default=512, help="characters a row")
    parser.add_argument("--learning-rate", type=float, default=3.5e-3)
    return parser.parse_args()


class RandomWindows:
    """Draws batches of windows of a text; a step of an epoch always draws the same."""

    def __init__(self, text_ids: np.ndarray, window: int, batch_size: int):
        self.text_ids, self.window, self.batch_size, self.epoch = text_ids, window, batch_size, 0

    def __call__(self, step: int):
        rng = np.random.default_rng([self.epoch, step])
        starts = rng.integers(len(self.text_ids) - self.window, size=self.batch_size)
        return inputs_and_targets(self.text_ids[starts[:, None] + np.arange(self.window + 1)])


def inputs_and_targets(rows: np.ndarray):
    token_ids = rows[:, :-1]
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}, rows[:, 1:]


def consecutive_windows(text_ids: np.ndarray, window: int):
    count = (len(text_ids) - 1) // window
    starts = np.arange(count)[:, None] * window
    return inputs_and_targets(text_ids[starts + np.arange(window + 1)])


def make_model(learning_rate: float, steps: int) -> keras_mamba2.Mamba2CausalLM:
    backbone = keras_mamba2.Mamba2Backbone(
        vocabulary_size=257,
        num_layers=6,
        hidden_dim=192,
        state_dim=64,
        head_dim=32,
        chunk_size=32,
        dropout=0.1,
    )
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, alpha=0.1, warmup_target=learning_rate, warmup_steps=100
    )
    optimizer = keras.optimizers.AdamW(
        schedule,
        weight_decay=0.1,
        beta_2=0.95,
        global_clipnorm=1.0,
        use_ema=True,
        ema_momentum=0.99,
    )
    optimizer.exclude_from_weight_decay(var_names=["A_log", "dt_bias", "/D", "scale", "bias"])
    lm = keras_mamba2.Mamba2CausalLM(backbone)
    lm.compile(optimizer=optimizer, weighted_metrics=[])
    return lm


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    text_ids = np.frombuffer(arguments.text.read_bytes(), "uint8").astype("int32")
    split = int(0.9 * len(text_ids))
    windows = RandomWindows(text_ids[:split], arguments.window, arguments.batch_size)
    training = grain.MapDataset.range(STEPS_PER_EPOCH).map(windows)
    validation = consecutive_windows(text_ids[split:], VALIDATION_WINDOW)
    lm = make_model(arguments.learning_rate, arguments.epochs * STEPS_PER_EPOCH)
    lm.summary()

    history = arguments.output / "history.csv"
    begun = time.time()
    lm.fit(
        training,
        epochs=arguments.epochs,
        validation_data=validation,
        validation_batch_size=12,
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda epoch, logs: setattr(windows, "epoch", epoch)
            ),
            # Before the averaged weights are swapped in, so that training resumes from its own.
            keras.callbacks.BackupAndRestore(arguments.output / "backup", delete_checkpoint=False),
            keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
            keras.callbacks.ModelCheckpoint(
                arguments.output / "best.weights.h5",
                monitor="val_loss",
                save_best_only=True,
                save_weights_only=True,
            ),
            keras.callbacks.CSVLogger(history, append=True),
        ],
    )
    print(json.dumps({"hours": (time.time() - begun) / 3600}))


if __name__ == "__main__":
    main()
