"""One of two processes that train one model, over `jax.distributed` on loopback.

    python -m tests.distribution.two_processes PORT PROCESSES PROCESS FOLDER [EPOCH_TO_DIE_IN]

Prints the losses of the epochs it ran. The weights in the end are written to FOLDER.
"""

import json
import os
import pathlib
import signal
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax
import keras
import numpy as np
import tensorflow as tf

from keras_mamba2 import Mamba2Backbone
from keras_mamba2 import Mamba2CausalLM
from keras_mamba2.training import BackupAndRestore

EPOCHS = 4


def main(port, num_processes, process, folder, epoch_to_die_in=None):
    folder, process = pathlib.Path(folder), int(process)
    if int(num_processes) > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{port}", int(num_processes), process, heartbeat_timeout_seconds=10
        )
    assert len(jax.devices()) == int(num_processes)
    keras.utils.set_random_seed(0)
    with keras.distribution.DataParallel(auto_shard_dataset=False).scope():
        lm = Mamba2CausalLM(Mamba2Backbone(20, 1, 8, state_dim=4, head_dim=4, chunk_size=4))
        lm.compile(optimizer=keras.optimizers.Adam(1e-2), weighted_metrics=[])
        callbacks = [BackupAndRestore(folder / "backup")]
        if epoch_to_die_in is not None:
            callbacks.append(Die(int(epoch_to_die_in)))
        history = lm.fit(
            dataset(int(num_processes), process), epochs=EPOCHS, callbacks=callbacks, verbose=0
        )
    if process == 0:
        np.savez(folder / "weights.npz", *lm.get_weights())
    print(json.dumps(history.history["loss"]), flush=True)


def dataset(num_processes, process):
    """This process' rows of every batch. KerasHub's pipeline hides from Keras how to share them."""
    token_ids = np.random.default_rng(0).integers(20, size=(16, 13))
    token_ids = token_ids.reshape(2, num_processes, -1, 13)[:, process]
    x = {"token_ids": token_ids[..., :-1], "padding_mask": np.ones_like(token_ids[..., 1:])}
    return tf.data.Dataset.from_tensor_slices((x, token_ids[..., 1:]))


class Die(keras.callbacks.Callback):
    def __init__(self, epoch: int):
        super().__init__()
        self.dies_in = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.dies_in:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
