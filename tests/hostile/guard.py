"""A process that loads what may kill it: its memory is bounded, and its time is by who asks."""

import hashlib
import multiprocessing
import pathlib
import resource

import numpy as np

import keras_mamba2
from keras_mamba2 import conversion
from keras_mamba2.conversion.readers import read_tensors
from keras_mamba2.conversion.soundness import checksums_compared
from keras_mamba2.state import files as state_files

MEMORY = 2 << 30  # bytes, beside what the libraries have mapped themselves
SECONDS = 20
LONGEST_MESSAGE = 5000

# Imports once, and forks: JAX has no threads yet.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.hostile.guard"])


def digest(arrays) -> str:
    """Of the names and numbers of arrays."""
    result = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        result.update(f"{name} {array.dtype} {array.shape}".encode())
        result.update(np.ascontiguousarray(array).tobytes())
    return result.hexdigest()


def tensors(folder) -> str:
    """Of a checkpoint, without a model."""
    stored = read_tensors(folder)
    with checksums_compared(stored.values()):
        return digest({name: tensor.read() for name, tensor in stored.items()})


def backbone(folder) -> str:
    loaded = keras_mamba2.Mamba2Backbone.from_preset(folder)
    return digest({w.path: np.asarray(w.numpy()) for w in loaded.weights})


def causal_lm(folder) -> str:
    return keras_mamba2.Mamba2CausalLM.from_preset(folder).name


def tokenizer(folder) -> str:
    return keras_mamba2.Mamba2Tokenizer.from_preset(folder).name


def arguments(folder) -> str:
    return repr(conversion.read_constructor_arguments(folder))


def describe(folder) -> str:
    return repr(conversion.describe(folder))


_models: dict[str, keras_mamba2.Mamba2Backbone] = {}


def session(file) -> str:
    """The state in `session.safetensors`, of the model in the folder `model` beside it."""
    folder = str(pathlib.Path(file).parent / "model")
    if folder not in _models:
        _models[folder] = keras_mamba2.Mamba2Backbone.from_preset(folder)
    *_, text = state_files.load(file, _models[folder])
    return text


def adapter(folder) -> str:
    """The adapter in `adapter`, for the model in the folder `model` beside it."""
    model = str(pathlib.Path(folder).parent / "model")
    lm = keras_mamba2.Mamba2CausalLM.from_preset(model)
    lm.load_peft_adapter(folder)
    return repr(lm.backbone.count_params())


LOADERS = {
    loader.__name__: loader
    for loader in (tensors, backbone, causal_lm, tokenizer, arguments, describe, session, adapter)
}


def serve(pipe) -> None:
    """Answers `(loader, path)` with what was loaded, or with the error's type and text."""
    limited = False
    while True:
        loader, path = pipe.recv()
        if not limited:
            mapped = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
            limit = mapped * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            limited = True
        try:
            answer = ("loaded", LOADERS[loader](path))
        except BaseException as error:
            answer = (type(error).__name__, str(error))
        pipe.send(answer)


class Guard:
    """Loads in another process, and starts a new one when that dies or hangs."""

    def __init__(self):
        self.process = None

    def load(self, loader: str, path) -> tuple[str, str]:
        """`("loaded", what)`, `(type, message)` of an error, `("hung", "")` or `("killed", "")`."""
        if self.process is None:
            self.pipe, theirs = processes.Pipe()
            self.process = processes.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        self.pipe.send((loader, str(path)))
        try:
            # The first one also pays for what is imported and compiled once.
            if self.pipe.poll(SECONDS):
                return self.pipe.recv()
            answer = ("hung", "")
        except EOFError:
            answer = ("killed", "")
        self.close()
        return answer

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def complaint(answer: tuple[str, str], *named: str) -> str:
    """What is wrong with an answer that should be an error which names one of `named`."""
    kind, message = answer
    if kind != "ValueError":
        return f"{kind}: {message[:300]}"
    if len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message)} characters"
    if not any(name in message for name in named):
        return f"a message that names no file: {message[:300]}"
    return ""
