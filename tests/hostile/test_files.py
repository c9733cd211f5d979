"""Hostile files, in a process with little memory: an error that names the file, and nothing else.

None loads in silence, is answered in somebody else's words, runs code, hangs or is killed.
"""

import json
import random
import re
import shutil
import struct

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.numpy import save_file

import keras_mamba2
from keras_mamba2.state import files as state_files
from tests.hostile import pickles
from tests.hostile.cases import CASES
from tests.hostile.guard import complaint

FLIPS = 150


@pytest.fixture(scope="session")
def good(preset_folder, tmp_path_factory):
    """Sound folders, to be damaged."""
    parent = tmp_path_factory.mktemp("good")
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    checkpoint, folder = parent / "checkpoint", parent / "bin"
    lm.export_to_transformers(checkpoint)
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(
        {name: torch.from_numpy(array) for name, array in tensors.items()},
        folder / "pytorch_model.bin",
    )
    session = parent / "session"
    session.mkdir()
    shutil.copytree(preset_folder, session / "model")
    lm.start("To be, or not").save(session / "session.safetensors")
    shutil.copytree(preset_folder, parent / "model")
    lm.backbone.enable_lora(2, ["in_proj"])
    lm.save_peft_adapter(parent / "adapter")
    return {
        "checkpoint": checkpoint,
        "bin": folder,
        "keras": preset_folder,
        "session": session,
        "adapter": parent / "adapter",
    }


def test_what_is_sound_loads(good, guard):
    for loader in ("tensors", "backbone", "causal_lm", "tokenizer", "arguments", "describe"):
        assert guard.load(loader, good["checkpoint"])[0] == "loaded"
        assert guard.load(loader, good["bin"])[0] == "loaded"
    for loader in ("backbone", "causal_lm", "tokenizer", "describe"):
        assert guard.load(loader, good["keras"])[0] == "loaded"
    assert guard.load("adapter", good["adapter"])[0] == "loaded"
    file = good["session"] / "session.safetensors"
    assert guard.load("session", file) == ("loaded", "To be, or not")


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_named(name, good, guard, tmp_path):
    base, loader, change, words = CASES[name]
    folder = shutil.copytree(good[base], tmp_path / "hostile")
    change(folder)
    answer = guard.load(loader, folder)
    assert not complaint(answer, str(folder))
    assert words in answer[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "is empty"),
        ("x" * 5000, "Unknown preset 'xxx"),
        ("a\0b", "Unknown preset"),
        ("\udcff", "Unknown preset"),
        ("/dev/null", "Unknown preset"),
        ("hf://", "is written 'hf://user/name'"),
    ],
)
def test_a_name_that_is_none(name, words, guard):
    answer = guard.load("backbone", name)
    assert answer[0] == "ValueError"
    assert words in answer[1]
    assert len(answer[1]) < 1500


def write_bin(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "pytorch_model.bin").write_bytes(content)
    return folder


def test_no_pickle_runs_or_loads(guard, tmp_path):
    marker = tmp_path / "ran"
    wrong, count = {}, 0
    contents = {**pickles.malicious(str(marker)), **pickles.odd()}
    for name, content in contents.items():
        folder = write_bin(tmp_path / "folder", pickles.zipped(content))
        wrong[name] = complaint(guard.load("tensors", folder), str(folder))
        assert not marker.exists(), name
        count += 1
    assert not {name: text for name, text in wrong.items() if text}
    assert count >= 110


def test_archives_that_say_one_thing_twice(good, guard, tmp_path):
    content = (good["bin"] / "pytorch_model.bin").read_bytes()
    wrong = {}
    for name, damaged in pickles.archives(content).items():
        folder = write_bin(tmp_path / "folder", damaged)
        wrong[name] = complaint(guard.load("tensors", folder), str(folder))
    assert not {name: text for name, text in wrong.items() if text}


def flipped(content, seed, start=0, end=None):
    """`content` with one bit flipped."""
    at = random.Random(seed).randrange(8 * start, 8 * (end or len(content)))
    byte = content[at // 8] ^ (1 << at % 8)
    return content[: at // 8] + bytes([byte]) + content[at // 8 + 1 :]


def header_size(content):
    return 8 + struct.unpack("<Q", content[:8])[0]


def test_a_flipped_bit_of_a_zip_changes_nothing_or_is_found(good, guard, tmp_path):
    """Of what nobody reads, such as the dates of entries, anything may flip."""
    content = (good["bin"] / "pytorch_model.bin").read_bytes()
    sound, wrong, found = guard.load("tensors", good["bin"]), {}, 0
    for seed in range(FLIPS):
        folder = write_bin(tmp_path / "folder", flipped(content, seed))
        answer = guard.load("tensors", folder)
        if answer != sound:
            found += 1
            wrong[seed] = complaint(answer, str(folder))
    assert not {seed: text for seed, text in wrong.items() if text}
    assert found > FLIPS / 2


def test_a_flipped_bit_of_a_header_changes_nothing_or_is_found(good, guard, tmp_path):
    """safetensors have no checksums: a header may still be one, of other tensors."""
    content = (good["checkpoint"] / "model.safetensors").read_bytes()
    shutil.copytree(good["checkpoint"], tmp_path / "folder")
    sound, wrong = guard.load("backbone", good["checkpoint"]), {}
    for seed in range(60):
        damaged = flipped(content, seed, 0, header_size(content))
        (tmp_path / "folder" / "model.safetensors").write_bytes(damaged)
        answer = guard.load("backbone", tmp_path / "folder")
        if answer != sound:
            wrong[seed] = complaint(answer, str(tmp_path / "folder"))
    # Two tensors of one shape may change places: then both names are those of the model.
    assert not {seed: text for seed, text in wrong.items() if text}


@pytest.fixture
def session(good, tmp_path):
    folder = shutil.copytree(good["session"], tmp_path / "session")
    return folder / "session.safetensors"


def test_a_flipped_bit_of_a_session_is_found(session, guard):
    content, wrong = session.read_bytes(), {}
    for seed in range(40):
        session.write_bytes(flipped(content, seed))
        wrong[seed] = complaint(guard.load("session", session), str(session))
    assert not {seed: text for seed, text in wrong.items() if text}


SESSIONS = {
    "a token beyond the vocabulary": ({"token": np.array([1_000_000], "i4")}, {}, "token must be"),
    "a negative token": ({"token": np.array([-7], "i4")}, {}, "token must be -1 to 256"),
    "a float token": ({"token": np.array([1.0], "f4")}, {}, "token is float32"),
    "a token of two axes": ({"token": np.array([[1]], "i4")}, {}, "token is int32 (1, 1)"),
    "another number of rows": ({"length": np.array([1, 2], "i4")}, {}, "length is int32 (2,)"),
    "a negative length": ({"length": np.array([-1], "i4")}, {}, "length must not be negative"),
    "a tensor too many": ({"extra": np.ones(1, "f4")}, {}, "Without a place: extra"),
    "a tensor too few": ({"ssm.0": None}, {}, "Missing: ssm.0"),
    "no digest": ({"digest": None}, {}, "Missing: digest"),
    "another shape": ({"ssm.0": np.ones((1, 8, 8, 9), "f4")}, {}, "ssm.0 is float32 (1, 8, 8, 9)"),
    "another dtype": ({"ssm.0": np.ones((1, 8, 8, 8), "f8")}, {}, "ssm.0 is float64"),
    "NaN": ({"ssm.0": np.full((1, 8, 8, 8), np.nan, "f4")}, {}, "not finite"),
    "no text": ({}, {"text": None}, "it has no text"),
    "no model": ({}, {"model": None}, "it has no model"),
    "no checksum": ({}, {"checksum": None}, "it has no checksum"),
    "an older version": ({}, {"version": "2"}, "written by an earlier version"),
    "no version": ({}, {"version": None}, "Received: 'None'"),
    "a version that is a text": ({}, {"version": "x" * 100_000}, "Expected: version="),
    "another model": ({}, {"model": "x" * 100_000}, "the state of another model"),
}


@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_that_was_written_by_others(name, session, guard):
    """With a checksum that fits, so that it is not that alone which finds it."""
    from safetensors import safe_open

    changed, texts, words = SESSIONS[name]
    with safe_open(session, "numpy") as stored:
        metadata = {**stored.metadata(), **texts}
    tensors = {**load_file(session), **changed}
    tensors = {key: array for key, array in tensors.items() if array is not None}
    metadata = {key: text for key, text in metadata.items() if text is not None}
    if "checksum" in metadata:
        metadata["checksum"] = state_files.checksum(tensors, metadata)
    save_file(tensors, session, metadata)
    answer = guard.load("session", session)
    assert not complaint(answer, str(session))
    assert words in answer[1]


ADAPTERS = {
    "a rank of zero": ({"r": 0}, "`r` must be a positive whole number"),
    "a rank that is a text": ({"r": "x"}, "`r` must be a positive whole number"),
    "an alpha of NaN": ({"lora_alpha": float("nan")}, "`lora_alpha` must be finite"),
    "a pattern that is a list": ({"rank_pattern": [1]}, "must be an object"),
    "a pattern that takes for ever": ({"rank_pattern": {"((a+)+)+$": 2}}, "too complex"),
    "many repetitions": ({"alpha_pattern": {".*.*.*.*.*.*x": 2}}, "too complex"),
    "a pattern that is none": ({"rank_pattern": {"(": 2}}, "adapter_config.json"),
    "another method": ({"peft_type": "x" * 100_000}, "`peft_type` must be one of"),
    "an unknown key": ({"x" * 100_000: 1}, "is not supported"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter(name, good, guard, tmp_path):
    changed, words = ADAPTERS[name]
    shutil.copytree(good["keras"], tmp_path / "model")
    folder = shutil.copytree(good["adapter"], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changed}))
    answer = guard.load("adapter", folder)
    assert not complaint(answer, str(folder))
    assert words in answer[1]


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "NaN of"), (1e300, "infinite of"), (1, "not floating point")]
)
def test_weights_of_an_adapter(value, words, good, guard, tmp_path):
    shutil.copytree(good["keras"], tmp_path / "model")
    folder = shutil.copytree(good["adapter"], tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: np.full(tensors[name].shape, value)}, file)
    if value == 1:
        save_file({**tensors, name: tensors[name].astype("int32")}, file)
    answer = guard.load("adapter", folder)
    assert not complaint(answer, str(folder))
    assert words in answer[1]


VALUES = [
    np.nan,
    np.inf,
    -np.inf,
    -1,
    0,
    1.5,
    "x",
    None,
    [],
    {},
    10**9,
    10**12,
    True,
    [[1]],
    -1e300,
]
# Any value of these is one of some model's, as long as it is of the right kind.
FREE = re.compile(r"time_step_(min|max|floor|limit)|layer_norm_epsilon|use_.*|.*_fp32|tie_.*")


def numeric_keys(folder):
    config = json.loads((folder / "config.json").read_text())
    return [key for key, value in config.items() if type(value) in (int, float, bool)]


def is_sane(arguments):
    numbers = [v for v in arguments.values() if isinstance(v, (int, float))]
    sizes = [v for key, v in arguments.items() if key.endswith(("_size", "_dim", "_layers"))]
    return all(np.isfinite(v) and v >= 0 for v in numbers) and all(
        type(v) is int and 0 < v < 2**31 for v in sizes
    )


def test_values_of_a_configuration(good, guard, tmp_path):
    """Every key that is a number, with every value of `VALUES`."""
    folder = tmp_path / "folder"
    folder.mkdir()
    config = json.loads((good["checkpoint"] / "config.json").read_text())
    wrong, count = {}, 0
    for key in numeric_keys(good["checkpoint"]):
        for value in VALUES:
            (folder / "config.json").write_text(json.dumps({**config, key: value}))
            answer, count = guard.load("arguments", folder), count + 1
            if answer[0] != "loaded":
                wrong[f"{key}={value}"] = complaint(answer, str(folder))
            elif not is_sane(eval(answer[1])):
                wrong[f"{key}={value}"] = answer[1]
    assert not {name: text for name, text in wrong.items() if text}
    assert count >= 250


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=8,
)


@hypothesis.settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_any_value_of_a_configuration(data, good, guard, tmp_path):
    config = json.loads((good["checkpoint"] / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    config[key] = data.draw(JSON_VALUES)
    (tmp_path / "config.json").write_text(json.dumps(config))
    answer = guard.load("arguments", tmp_path)
    if answer[0] == "loaded":
        assert is_sane(eval(answer[1]))
    else:
        assert not complaint(answer, str(tmp_path))
