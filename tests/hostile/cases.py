"""The table of hostile files: how each is made of a good one, what loads it, and what is said."""

import json
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

import h5py
import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save_file

NAN = float("nan")


class Case(NamedTuple):
    base: str  # the folder that is copied: "checkpoint", "bin" or "keras"
    loader: str  # of `guard.LOADERS`
    change: Callable  # of the copy
    words: str  # in the error


def write(name, content):
    def change(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def edit_json(name, *keys, **values):
    """Sets values in the JSON file `name`, inside the objects under `keys`; takes `...` out."""

    def change(folder):
        config = json.loads((folder / name).read_text())
        inner = config
        for key in keys:
            inner = inner[key]
        inner.update(values)
        for key in [key for key, value in values.items() if value is ...]:
            del inner[key]
        (folder / name).write_text(json.dumps(config))

    return change


def edit_tensors(function):
    """Changes the tensors of model.safetensors by `function(dict)`."""

    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        function(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


def edit_header(function):
    """Changes the header of model.safetensors, and leaves the data."""

    def change(folder):
        content = (folder / "model.safetensors").read_bytes()
        [size] = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        header = function(header) or header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        rest = content[8 + size :]
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + rest)

    return change


def set_entry(**values):
    def function(header):
        name = next(name for name in header if name != "__metadata__")
        header[name].update(values)

    return edit_header(function)


def edit_hdf5(function):
    def change(folder):
        with h5py.File(folder / "model.weights.h5", "r+") as file:
            function(file)

    return change


def replaced_by(name, make):
    def change(folder):
        (folder / name).unlink()
        make(folder / name)

    return change


def set_number(value):
    def function(tensors):
        tensors[NORM] = tensors[NORM].copy()
        tensors[NORM][1] = value

    return edit_tensors(function)


def index_of(shards):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    return change


def put(name, value):
    """Replaces or adds a tensor of an HDF5 file."""

    def function(file):
        if name in file:
            del file[name]
        file[name] = value

    return edit_hdf5(function)


def external_link(file):
    del file["layers/reversible_embedding"]
    file["layers/reversible_embedding"] = h5py.ExternalLink("other.h5", "/")


def compressed(file):
    name = "layers/gated_rms_normalization/vars/0"
    del file[name]
    file.create_dataset(name, shape=(10**9,), dtype="f4", chunks=(10**6,), compression="gzip")


def virtual(file):
    name = "layers/gated_rms_normalization/vars/0"
    del file[name]
    layout = h5py.VirtualLayout((32,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "a", (32,))
    file.create_virtual_dataset(name, layout)


NORM = "backbone.norm_f.weight"
NORM_H5 = "layers/gated_rms_normalization/vars/0"
CONFIG, KERAS_CONFIG = "config.json", ("config.json", "config")
DEEP = "[" * 100_000
HUGE = '{"a": [' + "[]," * 8_000_000 + "0]}"


def sparse(file):
    file.touch()
    os.truncate(file, 1 << 40)


JSON_FILES = {
    "is a folder": (lambda file: file.mkdir(), "is not a file: it is a folder"),
    "is a pipe": (lambda file: os.mkfifo(file), "is not a file: it is a pipe"),
    "is a loop of links": (lambda file: file.symlink_to(file), "cannot be read"),
    "is a device": (lambda file: file.symlink_to("/dev/zero"), "is not a file: it is a device"),
    "is a link to nothing": (lambda file: file.symlink_to("/nothing"), "is missing"),
    "is empty": (lambda file: file.write_text(""), "is truncated or not JSON"),
    "is nested deeply": (lambda file: file.write_text(DEEP), "nested too deeply"),
    "is nested deeply in objects": (
        lambda file: file.write_text('{"a":' * 100_000),
        "nested too deeply",
    ),
    "is huge": (lambda file: file.write_text(HUGE), "is larger than"),
    "is sparse and huge": (sparse, "is larger than"),
    "is not UTF-8": (lambda file: file.write_bytes(b'{"a": "\xff\xfe"}'), "not JSON"),
    "is UTF-16": (lambda file: file.write_bytes('{"a": 1}'.encode("utf-16")), "not JSON"),
    "is a list": (lambda file: file.write_text("[1, 2]"), "must hold a JSON object"),
    "is null": (lambda file: file.write_text("null"), "must hold a JSON object"),
    "has a number of many digits": (
        lambda file: file.write_text('{"a": ' + "9" * 100_000 + "}"),
        "not JSON",
    ),
}

# A file of a checkpoint's tokenizer may be missing, and then so may what is no file.
OPTIONAL = ("folder", "pipe", "loop", "device", "link to")


def json_cases():
    for base, loader, name in (
        ("checkpoint", "backbone", CONFIG),
        ("checkpoint", "describe", CONFIG),
        ("checkpoint", "tokenizer", "tokenizer_config.json"),
        ("keras", "causal_lm", CONFIG),
        ("keras", "causal_lm", "task.json"),
        ("keras", "causal_lm", "preprocessor.json"),
        ("keras", "causal_lm", "tokenizer.json"),
        ("keras", "describe", CONFIG),
    ):
        for what, (make, words) in JSON_FILES.items():
            if name != "tokenizer_config.json" or not any(word in what for word in OPTIONAL):
                yield (
                    f"{base}: {name} {what}, {loader}",
                    Case(base, loader, replaced_by(name, make), words),
                )


def safetensors_cases():
    changes = {
        "NaN": (set_number(NAN), "1 NaN of 32"),
        "infinity": (set_number(np.inf), "1 infinite of 32"),
        "float64 beyond float32": (
            edit_tensors(lambda t: t.update({NORM: np.full(32, 1e300)})),
            "32 infinite of 32",
        ),
        "uint8 weights": (
            edit_tensors(lambda t: t.update({NORM: np.ones(32, "uint8")})),
            "not floating point",
        ),
        "int64 weights": (
            edit_tensors(lambda t: t.update({NORM: np.ones(32, "int64")})),
            "not floating point",
        ),
        "a tensor too many": (
            edit_tensors(lambda t: t.update(extra=np.ones(3, "f4"))),
            "without a place in the model: extra",
        ),
        "a tensor too few": (edit_tensors(lambda t: t.pop(NORM)), f"missing in the files: {NORM}"),
        "another shape": (
            edit_tensors(lambda t: t.update({NORM: np.ones(33, "f4")})),
            "differ from the model's",
        ),
        "a dtype that is a list": (set_entry(dtype=["F32"]), "is damaged: its header says"),
        "a dtype that is unknown": (set_entry(dtype="F128"), "dtype that is not supported"),
        "a shape that is a text": (set_entry(shape="ab"), "is damaged: its header says"),
        "a negative shape": (set_entry(shape=[-1, 2]), "is damaged: its header says"),
        "a shape of floats": (set_entry(shape=[1.5]), "is damaged: its header says"),
        "a huge shape": (set_entry(shape=[2**62, 2**62]), "cannot have"),
        "a million axes": (set_entry(shape=[1] * 1_000_000), "is damaged"),
        "offsets that overlap": (
            edit_header(lambda h: overlapping(h)),
            "overlaps with the one before",
        ),
        "a hole": (edit_header(lambda h: shifted(h)), "follows a hole"),
        "offsets backwards": (set_entry(data_offsets=[8, 0]), "is damaged"),
        "one offset": (set_entry(data_offsets=[0]), "is damaged: its header says"),
        "offsets that are huge": (set_entry(data_offsets=[0, 2**70]), "cannot have"),
        "an entry that is null": (edit_header(lambda h: dict.fromkeys(h)), "its header says"),
        "a header that is a list": (edit_header(lambda h: b"[]  "), "is not a safetensors file"),
        "a header that is nested deeply": (
            edit_header(lambda h: b'{"a":' + b"[" * 100_000),
            "nested too deeply",
        ),
        "a header that is not UTF-8": (edit_header(lambda h: b'{"\xff": 1}'), "not JSON"),
        "a header of 2**60 bytes": (
            write("model.safetensors", struct.pack("<Q", 2**60) + b"{}"),
            "not a safetensors file",
        ),
        "a header of 40 MB": (
            write("model.safetensors", struct.pack("<Q", 40_000_000) + b"{" + b" " * 40_000_000),
            "not a safetensors file",
        ),
        "nothing": (write("model.safetensors", b""), "not a safetensors file"),
        "bytes behind the data": (
            lambda folder: os.truncate(folder / "model.safetensors", 1_000_000),
            "is damaged",
        ),
        "a pipe": (replaced_by("model.safetensors", os.mkfifo), "holds no weights"),
        "an index with a number": (index_of({NORM: 7}), "must name a file for"),
        "an index with a list": (index_of({NORM: [["a"]]}), "must name a file for"),
        "an index that leaves the folder": (index_of({NORM: "../a.safetensors"}), "outside its"),
        "an index with a long name": (index_of({NORM: "a" * 5000}), "is missing, a shard"),
        "an index with a zero": (index_of({NORM: "a\0b"}), "is missing, a shard"),
        "an index with an empty name": (index_of({NORM: ""}), "outside its"),
        "an index of other tensors": (
            index_of({f"extra{i}": "model-1.safetensors" for i in range(10_000)}),
            "and 9980 more",
        ),
        "an index that is a list": (
            lambda folder: index_of({})(folder),
            "has no `weight_map`",
        ),
    }
    for name, (change, words) in changes.items():
        yield f"safetensors: {name}", Case("checkpoint", "backbone", change, words)


def overlapping(header):
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: offsets(header, n))
    twins = [n for n in names if header[n]["shape"] == header[names[-1]]["shape"]]
    header[twins[-1]]["data_offsets"] = header[twins[0]]["data_offsets"]


def shifted(header):
    last = max((n for n in header if n != "__metadata__"), key=lambda n: offsets(header, n))
    header[last]["data_offsets"] = [offset + 4 for offset in header[last]["data_offsets"]]


def offsets(header, name):
    return header[name]["data_offsets"]


def hdf5_cases():
    changes = {
        "NaN": (put(NORM_H5, np.full(32, NAN, "f4")), "32 NaN of 32"),
        "infinity": (put(NORM_H5, np.full(32, np.inf, "f4")), "32 infinite of 32"),
        "float64 beyond float32": (put(NORM_H5, np.full(32, -1e300)), "32 infinite of 32"),
        "integers": (put(NORM_H5, np.ones(32, "i4")), "weights of another model"),
        "texts": (put(NORM_H5, ["a"] * 32), "not stored as plain numbers"),
        "another shape": (put(NORM_H5, np.ones((2, 16), "f4")), "weights of another model"),
        "a tensor too many": (put("layers/extra/vars/0", np.ones(3)), "without a place"),
        "a block too many": (
            put("layers/mamba2_block_2/norm/vars/0", np.ones(32)),
            "2 blocks, the weights have 3",
        ),
        "a tensor too few": (
            edit_hdf5(lambda file: file.__delitem__(NORM_H5)),
            f"missing in the file: {NORM_H5}",
        ),
        "a link to another file": (edit_hdf5(external_link), "missing in the file"),
        "compressed zeros": (edit_hdf5(compressed), "not stored as plain numbers"),
        "a virtual dataset": (edit_hdf5(virtual), "not stored as plain numbers"),
        "no layers": (edit_hdf5(lambda file: file.__delitem__("layers")), "the weights have 0"),
        "the signature alone": (write("model.weights.h5", b"\x89HDF\r\n\x1a\n"), "truncated or"),
        "a pipe": (replaced_by("model.weights.h5", os.mkfifo), "it is a pipe"),
        "a shard that is a number": (shards_of({"/vars": 3}), "must name files beside it"),
        "a shard elsewhere": (shards_of({"/vars": "/etc/passwd"}), "must name files beside it"),
        "a shard that is missing": (shards_of({"/vars": "a.weights.h5"}), "is missing"),
        "no shards": (shards_of({}), "has no `weight_map`"),
        "a weight map that is a list": (shards_of([]), "has no `weight_map`"),
    }
    for name, (change, words) in changes.items():
        yield f"HDF5: {name}", Case("keras", "backbone", change, words)


def shards_of(weight_map):
    def change(folder):
        (folder / "model.weights.h5").rename(folder / "model_00000.weights.h5")
        (folder / "model.weights.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def configuration_cases():
    keras = {
        "a config that is null": (edit_json(CONFIG, config=None), "Expected: `config`"),
        "a config that is a list": (edit_json(CONFIG, config=[]), "Expected: `config`"),
        "an unknown dtype": (edit_json(*KERAS_CONFIG, dtype="x"), "config.json: "),
        "a dtype that is a number": (edit_json(*KERAS_CONFIG, dtype=3), "config.json: "),
        "a billion layers": (edit_json(*KERAS_CONFIG, num_layers=10**9), "`num_layers` must be"),
        "more layers than weights": (edit_json(*KERAS_CONFIG, num_layers=3), "3 blocks, the"),
        "a vocabulary of a billion": (
            edit_json(*KERAS_CONFIG, vocabulary_size=10**9),
            "weights of another model",
        ),
        "an epsilon of NaN": (
            edit_json(*KERAS_CONFIG, layer_norm_epsilon=NAN),
            "`layer_norm_epsilon` must be",
        ),
        "no sizes": (edit_json(*KERAS_CONFIG, hidden_dim=...), "config.json: "),
        "another class": (
            edit_json(CONFIG, registered_name="keras>Dense"),
            "not the configuration of a Mamba2Backbone",
        ),
        "a class that is a list": (
            edit_json(CONFIG, registered_name=["a" * 1000]),
            "not the configuration of a Mamba2Backbone",
        ),
        "an unknown argument": (
            edit_json(*KERAS_CONFIG, surprise=1),
            "no such arguments: surprise",
        ),
    }
    for name, (change, words) in keras.items():
        yield f"Keras: {name}", Case("keras", "backbone", change, words)
    tasks = {
        "an empty object": (write("task.json", "{}"), "task.json is not the configuration of"),
        "a config that is null": (edit_json("task.json", config=None), "Expected: `config`"),
        "another class": (edit_json("task.json", registered_name="x>Y"), "config.json: "),
        "a backbone in a list": (edit_json("task.json", "config", backbone=[1]), "task.json: "),
        "a backbone of a billion layers": (
            edit_json("task.json", "config", "backbone", "config", num_layers=10**9),
            "task.json: `num_layers` must be",
        ),
        "a lambda": (
            edit_json(
                "task.json",
                "config",
                "preprocessor",
                class_name="Lambda",
                module="keras.layers",
                registered_name="Lambda",
                config={"name": "a", "function": {"class_name": "__lambda__", "config": {}}},
            ),
            "config.json: ",
        ),
        "another module": (
            edit_json(
                "task.json", "config", "preprocessor", module="os", class_name="system",
                registered_name=None, config={"command": "touch ran"},
            ),
            "config.json: ",
        ),
    }  # fmt: skip
    for name, (change, words) in tasks.items():
        yield f"task: {name}", Case("keras", "causal_lm", change, words)
    checkpoints = {
        "a billion layers": (
            edit_json(CONFIG, num_hidden_layers=10**9),
            "`num_hidden_layers` must",
        ),
        "more layers than weights": (
            edit_json(CONFIG, num_hidden_layers=1000),
            "says 1000 layers, the weights have 2",
        ),
        "fewer layers than weights": (edit_json(CONFIG, num_hidden_layers=1), "without a place"),
        "a vocabulary of a billion": (edit_json(CONFIG, vocab_size=10**9), "differ from the model"),
        "heads of a billion": (edit_json(CONFIG, head_dim=10**9), "differ from the model"),
        "texts for numbers": (edit_json(CONFIG, num_heads="x", head_dim=2**31 - 1), "`num_heads`"),
        "an epsilon of NaN": (edit_json(CONFIG, layer_norm_epsilon=NAN), "`layer_norm_epsilon`"),
        "a negative epsilon": (edit_json(CONFIG, layer_norm_epsilon=-1), "`layer_norm_epsilon`"),
        "an unknown model": (edit_json(CONFIG, model_type="x" * 100_000), "Unknown `model_type`"),
        "a model type that is a list": (edit_json(CONFIG, model_type=[[]]), "`model_type` must"),
        "limits that are a number": (edit_json(CONFIG, time_step_limit=3), "config.json: "),
        "limits backwards": (edit_json(CONFIG, time_step_limit=[1, 0]), "`time_step_limit` must"),
        "limits that are negative": (edit_json(CONFIG, time_step_limit=[-2, -1]), "must be a pair"),
        "itself for its sources": (
            write("sources.json", '{"weights": ".", "tokenizer": "hf://a/b"}'),
            "without a place in the model",
        ),
    }
    checkpoints["itself for its sources"] = (
        both(checkpoints["itself for its sources"][0], set_number(NAN)),
        "1 NaN of 32",
    )
    for name, (change, words) in checkpoints.items():
        yield f"checkpoint: {name}", Case("checkpoint", "backbone", change, words)


def tokenizer_cases():
    options, stored = "tokenizer_config.json", "tokenizer.json"
    tokens = {
        "an added token that is no dict": edit_json(options, added_tokens_decoder={"999": 5}),
        "an added token that is nothing": edit_json(options, added_tokens_decoder={"999": None}),
        "an added token without a text": edit_json(options, added_tokens_decoder={"999": {}}),
        "an added token of no number": edit_json(options, added_tokens_decoder={"x": "a"}),
        "added tokens that are a number": edit_json(options, added_tokens_decoder=5),
        "a special token without a text": edit_json(options, bos_token={"lstrip": True}),
        "a special token that is a list": edit_json(options, bos_token=["a"]),
        "a special token that is a number": edit_json(options, bos_token=7),
        "stored tokens that are a number": edit_json(stored, added_tokens=5),
        "stored tokens without a text": edit_json(stored, added_tokens=[{"id": 1}]),
        "a tokenizer of nothing, and a special token": both(
            write(stored, "{}"), edit_json(options, bos_token="new")
        ),
        "a template that is no text": write("chat_template.jinja", b"\xff"),
    }
    for name, change in tokens.items():
        words = stored if "stored" in name or "of nothing" in name else options
        words = "chat_template.jinja" if "template" in name else words
        yield f"tokenizer: {name}", Case("checkpoint", "tokenizer", change, words)


def both(first, second):
    def change(folder):
        first(folder)
        second(folder)

    return change


CASES = {
    **dict(json_cases()),
    **dict(safetensors_cases()),
    **dict(hdf5_cases()),
    **dict(configuration_cases()),
    **dict(tokenizer_cases()),
}
