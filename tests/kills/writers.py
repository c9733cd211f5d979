"""All that writes, as processes to be killed: each loops over versions that can be told apart."""

import pathlib
import resource
import shutil
import time

import grain
import keras
import numpy as np
import typer

import keras_mamba2
from keras_mamba2 import cli
from tests.training import runs

EPOCHS = 8
# A version is a number. All weights have it, and the preprocessor's length is this much more.
LENGTH = 100


def make_lm() -> keras_mamba2.Mamba2CausalLM:
    """5 MB, so that writing takes a while."""
    tokenizer = runs.make_lm().preprocessor.tokenizer
    return keras_mamba2.Mamba2CausalLM(
        keras_mamba2.Mamba2Backbone(20_000, 2, 64, state_dim=8, head_dim=8, chunk_size=8),
        keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, sequence_length=LENGTH),
    )


def set_version(lm, version: int) -> None:
    for variable in lm.weights:
        variable.assign(np.full(variable.shape, version, variable.dtype))
    lm.preprocessor.sequence_length = LENGTH + version


def version_of(lm) -> int:
    values = {float(x) for w in lm.get_weights() for x in (w.min(), w.max())}
    assert len(values) == 1, f"weights of several versions: {values}"
    return int(values.pop())


class Writer:
    """Writes `target` in `folder`, which is empty but for it."""

    name = "target"
    size_limit = 1_000_000  # less than the largest file that is written

    def __init__(self, folder: pathlib.Path):
        self.folder, self.target = folder, folder / self.name
        self.lm = make_lm()

    def write(self, version: int) -> None:
        raise NotImplementedError

    def make_room(self) -> None:
        """For what refuses to write over the old one."""

    def load(self) -> keras_mamba2.Mamba2CausalLM:
        return keras_mamba2.Mamba2CausalLM.from_preset(self.target)

    def read(self) -> int:
        """The version of what is there."""
        lm = self.load()
        version = version_of(lm)
        assert lm.preprocessor.sequence_length == LENGTH + version
        return version


class Preset(Writer):
    def write(self, version):
        set_version(self.lm, version)
        self.lm.save_to_preset(self.target)


class KerasFile(Writer):
    name = "target.keras"

    def write(self, version):
        set_version(self.lm, version)
        self.lm.save(self.target)

    def load(self):
        return keras.models.load_model(self.target)


class Export(Writer):
    def write(self, version):
        set_version(self.lm, version)
        self.lm.export_to_transformers(self.target)

    def make_room(self):
        if self.target.exists():
            shutil.rmtree(self.target.rename(self.folder.with_name(f"old_{time.time_ns()}")))

    def read(self):  # transformers knows no `sequence_length`
        return version_of(self.load())


class Convert(Export):
    def __init__(self, folder):
        super().__init__(folder)
        self.source = folder.with_name(f"{folder.name}_source")

    def write(self, version):
        if not self.source.exists():
            set_version(self.lm, 1)
            self.lm.save_to_preset(self.source)
        to = cli.Format.keras if version % 2 else cli.Format.transformers
        cli.convert(str(self.source), self.target, to, "auto", True)


class Session(Writer):
    name = "target.safetensors"
    size_limit = 5_000

    def __init__(self, folder):
        super().__init__(folder)
        set_version(self.lm, 1)
        self.lm.compile(sampler="greedy")

    def write(self, version):
        # `start` each time: what a session was told is in the tensors and in the text.
        self.lm.start(str(version)).save(self.target)

    def read(self):
        session = self.lm.resume(self.target)
        version = int(session.text)
        expected = self.lm.start(session.text).state
        for name in ("token", "length"):
            values = (getattr(state, name) for state in (session.state, expected))
            np.testing.assert_array_equal(*values)
        return version


class Backup(Writer):
    """A backup alone; `fit` is below."""

    def __init__(self, folder):
        super().__init__(folder)
        self.lm.compile(optimizer="sgd")
        self.lm.optimizer.build(self.lm.trainable_variables)
        self.callback = keras_mamba2.training.BackupAndRestore(self.target)
        self.callback.set_model(self.lm)

    def write(self, version):
        set_version(self.lm, version)
        self.callback.on_epoch_end(version - 1)

    def read(self):
        set_version(self.lm, 0)
        self.callback.on_train_begin()
        version = version_of(self.lm)
        assert self.lm._initial_epoch == version
        return version


WRITERS = {
    writer.__name__: writer for writer in (Preset, KerasFile, Export, Convert, Session, Backup)
}


def write_until_killed(name: str, folder: pathlib.Path, pipe) -> None:
    writer = WRITERS[name](folder)
    writer.make_room()
    writer.write(1)
    start = time.perf_counter()
    writer.make_room()
    writer.write(2)
    pipe.send(time.perf_counter() - start)
    for version in range(3, 1_000_000):
        writer.make_room()
        writer.write(version)


def write_to_a_full_disk(name: str, folder: pathlib.Path, pipe) -> None:
    """Sends the error. A limit of the size of files gives `OSError` where a full disk does."""
    writer = WRITERS[name](folder)
    writer.write(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.size_limit, resource.RLIM_INFINITY))
    writer.make_room()
    try:
        writer.write(2)
    except (OSError, typer.Exit) as error:
        if isinstance(error, typer.Exit):  # the command line has made a line of it
            error = error.__context__
        pipe.send((repr(error), getattr(error, "__notes__", [])))
    else:
        pipe.send(("nothing was raised", []))


def fit(folder: pathlib.Path, pipe) -> None:
    """Trains on data in another order each epoch; sends whether it began at a backup, and `None`.

    The weights in the end are `folder / weights.npz`.
    """
    lm = runs.make_lm(dropout=0.3)
    batches = grain.MapDataset.source(runs.TEXTS).seed(7).shuffle().repeat(EPOCHS)
    batches = batches.batch(runs.BATCH_SIZE)
    backup = keras_mamba2.training.BackupAndRestore(folder / "backup")
    done = keras_mamba2.training.restore(lm, backup)
    pipe.send(done > 0)
    slowly = keras.callbacks.LambdaCallback(on_train_batch_end=lambda i, logs: time.sleep(0.02))
    if done < len(batches):
        lm.fit(
            batches[done:],
            epochs=EPOCHS,
            steps_per_epoch=runs.STEPS_PER_EPOCH,
            callbacks=[keras_mamba2.training.SeedByEpoch(), backup, slowly],
            verbose=0,
        )
    else:
        backup.on_train_end()
    np.savez(folder.with_name(f"{folder.name}.npz"), *runs.weights_of(lm))
    pipe.send(None)
