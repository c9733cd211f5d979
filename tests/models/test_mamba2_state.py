"""The state of a model: its rows, and its file."""

import resource

import keras
import numpy as np
import pytest
from keras import ops
from keras import tree

import keras_mamba2
from keras_mamba2 import Mamba2State


@pytest.fixture(scope="module")
def lm(preset_folder):
    return keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)


@pytest.fixture(scope="module")
def state(lm):
    return lm.prefill(["To be", "or not to be, that", "?"])


def assert_same(state, other):
    leaves, others = tree.flatten(state), tree.flatten(other)
    assert len(leaves) == len(others)
    for leaf, its in zip(leaves, others, strict=True):
        leaf, its = ops.convert_to_numpy(leaf), ops.convert_to_numpy(its)
        assert leaf.dtype == its.dtype
        np.testing.assert_array_equal(leaf, its)


def test_the_last_token_waits(state):
    np.testing.assert_array_equal(state.length, [4, 17, 0])
    assert bytes(np.asarray(state.token).tolist()) == b"et?"


def test_rows_are_taken_repeated_and_put_together(state):
    assert_same(Mamba2State.concatenate([state[0], state[1:]]), state)
    assert_same(state[-1], state[2])
    assert_same(state[np.int64(1)], state[1:2])
    twice = state.repeat(2)
    assert twice.batch_size == 6
    assert_same(twice[::2], state)
    assert_same(twice[1::2], state)
    assert [row.batch_size for row in state] == [1, 1, 1]
    with pytest.raises(IndexError, match="Row 3 of a state with 3 rows"):
        state[3]
    with pytest.raises(ValueError, match="n=0"):
        state.repeat(0)
    with pytest.raises(ValueError, match="no states"):
        Mamba2State.concatenate([])


def test_states_of_different_models_are_not_put_together(state, lm):
    def changed(**sizes):
        def padded(name, leaf):
            widths = [(0, 0)] * len(leaf.shape)
            for axis, more in sizes.get(name, {}).items():
                widths[axis] = (0, more)
            return np.pad(leaf, widths)

        layers = [
            type(layer)(*(padded(*named) for named in zip(layer._fields, layer, strict=True)))
            for layer in state.layers
        ]
        return Mamba2State(layers, state.token, state.length, state.digest)

    for sizes in (
        {"ssm": {3: 8}, "conv": {2: 16}},  # another state_dim
        {"ssm": {2: 8}, "conv": {2: 16}},  # another head_dim
        {"conv": {2: 8}},
        {"ssm": {1: 1, 2: 1}},
    ):
        with pytest.raises(ValueError, match="belong to different models.* shapes .* and "):
            Mamba2State.concatenate([state, changed(**sizes)])
    fewer = Mamba2State(state.layers[1:], state.token, state.length, state.digest)
    with pytest.raises(ValueError, match="different numbers of layers"):
        Mamba2State.concatenate([state, fewer])


def test_its_size_does_not_depend_on_the_text(lm):
    assert lm.prefill("a").nbytes == lm.prefill("a" * 700).nbytes
    assert lm.prefill(["a"] * 3).nbytes == 3 * lm.prefill("a").nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_gives_it_back_bit_for_bit(preset_folder, tmp_path, dtype):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, dtype=dtype)
    state = lm.prefill(["to be", "or not"])
    state.save(tmp_path / "state.safetensors", lm.backbone)
    loaded = Mamba2State.load(tmp_path / "state.safetensors", lm.backbone)
    assert_same(loaded, state)
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.fixture
def file(state, lm, tmp_path):
    state.save(tmp_path / "state.safetensors", lm.backbone)
    return tmp_path / "state.safetensors"


def test_a_state_of_another_architecture_is_refused(file, state):
    other = keras_mamba2.Mamba2Backbone(257, 1, 32, state_dim=8, head_dim=8)
    message = r"state.safetensors is the state of another model, Mamba2Backbone\(num_layers=2.*"
    with pytest.raises(ValueError, match=message + "This one is Mamba2Backbone.num_layers=1"):
        Mamba2State.load(file, other)
    with pytest.raises(ValueError, match="belongs to another model.*1 layers.*Received: 2 layers"):
        state.save(file, other)
    with pytest.raises(ValueError, match="belongs to another model"):
        keras_mamba2.Mamba2CausalLM(other).generate(
            {"token_ids": np.ones((3, 9)), "padding_mask": np.ones((3, 2))[:, :1] * np.eye(9)[0]},
            stop_token_ids=None,
            state=state,
        )


def test_a_state_of_other_weights_is_refused(file, preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    Mamba2State.load(file, lm.backbone)
    lm.compile(optimizer=keras.optimizers.SGD(1e-2))
    lm.fit(["to be, or not to be"], verbose=0)
    with pytest.raises(ValueError, match="another model.*This one has other weights"):
        Mamba2State.load(file, lm.backbone)


def test_a_damaged_file_is_named(file, lm):
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], content[:5], b"not a state" * 9):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="state.safetensors is truncated, or not the file"):
            Mamba2State.load(file, lm.backbone)
    file.unlink()
    with pytest.raises(ValueError, match="state.safetensors is missing"):
        Mamba2State.load(file, lm.backbone)


def test_a_file_of_another_version_is_named(file, lm):
    from safetensors.numpy import save_file

    save_file({"a": np.ones(1)}, file, {"version": "9"})
    with pytest.raises(ValueError, match="Expected: version='4'. Received: '9'"):
        Mamba2State.load(file, lm.backbone)
    save_file({"a": np.ones(1)}, file, {"version": "2", "text": "To be"})
    with pytest.raises(ValueError, match="by an earlier version of this package. Its text is kept"):
        Mamba2State.load(file, lm.backbone)


def test_a_state_that_is_not_finite_is_not_saved(file, state, lm):
    before = file.read_bytes()
    nan = tree.map_structure(lambda leaf: leaf * np.nan, state.layers)
    broken = Mamba2State(nan, state.token, state.length, state.digest)
    with pytest.raises(ValueError, match="not finite, in conv.0, ssm.0"):
        broken.save(file, lm.backbone)
    assert file.read_bytes() == before


def test_a_file_that_cannot_be_written_leaves_the_old_one(file, lm, state, monkeypatch):
    before = file.read_bytes()

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        state.save(file, lm.backbone)
    assert file.read_bytes() == before
    assert len(list(file.parent.iterdir())) == 1


def test_a_full_disk_is_an_error_of_the_system(file, lm, state):
    """Not one of the library's own, which nobody catches."""
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^state.safetensors could not be written: .*too large"):
            state.save(file, lm.backbone)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
