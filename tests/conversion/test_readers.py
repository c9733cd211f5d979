"""Files of checkpoints: the arrays that torch wrote, and one clear error for each bad file."""

import collections
import json
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from keras_mamba2.conversion.readers import read_tensors

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)


@pytest.fixture
def tensors():
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12) / 7
    tensors = {str(dtype): base.to(dtype) for dtype in DTYPES}
    return {**tensors, "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3)}


@pytest.fixture
def safetensors(tmp_path, tensors):
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    return file


@pytest.fixture
def bin(tmp_path, tensors):
    file = tmp_path / "pytorch_model.bin"
    torch.save(collections.OrderedDict(tensors), file)
    return file


def assert_reads(folder, tensors):
    stored = read_tensors(folder)
    assert set(stored) == set(tensors)
    for name, tensor in tensors.items():
        value = stored[name].read()
        is_bfloat16 = tensor.dtype == torch.bfloat16
        assert (value.dtype == ml_dtypes.bfloat16) == is_bfloat16
        expected = (tensor.float() if is_bfloat16 else tensor).detach().numpy()
        np.testing.assert_array_equal(value.astype(expected.dtype), expected)
        assert value.shape == expected.shape


def test_safetensors(safetensors, tensors):
    assert_reads(safetensors.parent, tensors)


def test_bin(bin, tensors):
    assert_reads(bin.parent, tensors)


def test_bin_with_views_parameters_and_shared_storages(tmp_path):
    base = torch.randn(6, 8)
    tensors = {
        "base": base,
        "again": base,
        "transposed": base.T,
        "part": base[2:5, 1::3],
        "parameter": torch.nn.Parameter(base),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_reads(tmp_path, tensors)


def test_reading_is_lazy(safetensors):
    value = read_tensors(safetensors.parent)["torch.float32"].read()
    assert isinstance(value.base, np.memmap)
    assert not value.flags.writeable


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("level", [0, 1])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, level):
    marker = tmp_path / "marker"
    evil = Evil(os.mkdir, str(marker))
    pickle.loads(pickle.dumps(evil))
    marker.rmdir()  # it does run in an ordinary unpickler
    content = {"weight": torch.ones(2), "evil": evil if level == 0 else [{"deep": evil}]}
    torch.save(content, tmp_path / "pytorch_model.bin")
    message = f"pytorch_model.bin is refused: its pickle names {os.mkdir.__module__}.mkdir"
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["builtins eval", "torch load", "numpy frombuffer", "os system"])
def test_a_name_alone_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("a/data.pkl", b"c" + name.replace(" ", "\n").encode() + b"\n.")
    with pytest.raises(ValueError, match=f"names {name.replace(' ', '.')}, which is no part"):
        read_tensors(tmp_path)


def test_a_tensor_beyond_its_storage(tmp_path):
    torch.save({"a": torch.ones(4)}, tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        for name, value in content.items():
            # The shape (4,) is written as BININT1 4, TUPLE1.
            archive.writestr(name, value.replace(b"K\x04\x85", b"K\x09\x85"))
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged: .* beyond its storage"):
        read_tensors(tmp_path)


def test_a_tensor_of_more_elements_than_are_there(tmp_path):
    """It would take any amount of memory as soon as it is read."""
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"shape \(1000000000000,\) share a place"):
        read_tensors(tmp_path)


def test_what_is_no_dict_of_tensors(tmp_path):
    torch.save({"a": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold tensors by name. Received: 'a': int"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("part", [0.1, 0.9])
def test_a_truncated_file_is_named(request, kind, part):
    file = request.getfixturevalue(kind)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=f"{file} is truncated"):
        read_tensors(file.parent)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", b"\x80\x02" * 40])
def test_a_foreign_file_is_named(request, kind, content):
    file = request.getfixturevalue(kind)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is not a"):
        read_tensors(file.parent)


def test_a_git_lfs_pointer_is_named(safetensors):
    safetensors.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=f"{safetensors} is a Git LFS pointer"):
        read_tensors(safetensors.parent)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "is damaged.*cannot have 4 bytes"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 4]}, "dtype that is not supported: F4"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "is damaged: its header says"),
        ({"dtype": "F32"}, "is damaged: its header says of 'a'"),
        (3, "is damaged: its header says of 'a': 3"),
    ],
)
def test_a_header_that_lies(tmp_path, entry, message):
    header = json.dumps({"a": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path)


class TestShards:
    @pytest.fixture
    def index(self, tmp_path, tensors):
        names = list(tensors)
        weight_map = {}
        for i, part in enumerate([names[:3], names[3:]], start=1):
            file = f"model-{i:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, tmp_path / file)
            weight_map.update(dict.fromkeys(part, file))
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        return index

    def test_are_read_as_one(self, index, tensors):
        assert_reads(index.parent, tensors)

    def test_of_bin(self, tmp_path, tensors):
        for i, name in enumerate(tensors):
            torch.save({name: tensors[name]}, tmp_path / f"{i}.bin")
        weight_map = {name: f"{i}.bin" for i, name in enumerate(tensors)}
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert_reads(tmp_path, tensors)

    def test_a_missing_one_is_named(self, index):
        shard = index.with_name("model-00002-of-00002.safetensors")
        shard.unlink()
        with pytest.raises(ValueError, match=f"{shard} is missing"):
            read_tensors(index.parent)

    @pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd"])
    def test_outside_the_folder_are_refused(self, index, name):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="names a shard outside its folder"):
            read_tensors(index.parent)

    def test_a_tensor_that_none_holds_is_named(self, index):
        content = json.loads(index.read_text())
        content["weight_map"]["extra"] = "model-00001-of-00002.safetensors"
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="names tensors that no shard holds: extra"):
            read_tensors(index.parent)

    @pytest.mark.parametrize("content", ["{", "{}"])
    def test_a_damaged_index_is_named(self, index, content):
        index.write_text(content)
        with pytest.raises(ValueError, match=f"{index} (is truncated|has no `weight_map`)"):
            read_tensors(index.parent)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no weights. Expected one of: model"):
        read_tensors(tmp_path)
