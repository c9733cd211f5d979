"""What a backup is on disk, and which one is restored. `tests/kills` has the kills."""

import json
import shutil
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2.training import BackupAndRestore
from tests.training import runs

EPOCHS = 4


@pytest.fixture(scope="module")
def shared_lm():
    return runs.make_lm()


@pytest.fixture
def lm(shared_lm):
    before = runs.snapshot(shared_lm)
    yield shared_lm
    runs.put_back(before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fit(lm, backup, *callbacks, epochs=EPOCHS):
    """The epochs that were run."""
    history = runs.use(lm.fit, runs.TEXTS, epochs=epochs, callbacks=[backup, *callbacks])
    return history.epoch


def test_only_the_last_backup_is_kept_and_none_when_training_is_over(lm, tmp_path):
    seen = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(names(tmp_path / "backup"))
    )
    fit(lm, BackupAndRestore(tmp_path / "backup"), record)
    assert seen == [[f"{number:08}"] for number in range(1, EPOCHS + 1)]
    assert names(tmp_path) == []


def test_the_next_training_begins_at_its_own_first_epoch(lm, tmp_path):
    fit(lm, BackupAndRestore(tmp_path / "first", delete_checkpoint=False), epochs=2)
    assert fit(lm, BackupAndRestore(tmp_path / "first"), epochs=3) == [2]
    assert fit(lm, BackupAndRestore(tmp_path / "second"), epochs=2) == [0, 1]
    fit(lm, BackupAndRestore(tmp_path / "third", delete_checkpoint=False), epochs=2)
    failing = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(lm, BackupAndRestore(tmp_path / "third"), failing)
    assert fit(lm, BackupAndRestore(tmp_path / "fourth"), epochs=1) == [0]


def test_training_goes_on_after_the_last_backup(lm, tmp_path):
    fit(lm, BackupAndRestore(tmp_path, delete_checkpoint=False), epochs=2)
    weights = runs.weights_of(lm)
    lm.set_weights([np.zeros_like(weight) for weight in weights])
    backup = BackupAndRestore(tmp_path, delete_checkpoint=False)
    assert keras_mamba2.training.restore(lm, backup) == 2 * runs.STEPS_PER_EPOCH
    assert all(map(np.array_equal, runs.weights_of(lm), weights))
    assert fit(lm, backup) == [2, 3]
    assert names(tmp_path) == ["00000004"]


def test_who_was_killed_at_the_very_end_has_only_to_remove_its_backup(lm, tmp_path):
    fit(lm, BackupAndRestore(tmp_path / "backup", delete_checkpoint=False), epochs=2)
    weights = runs.weights_of(lm)
    backup = BackupAndRestore(tmp_path / "backup")
    assert keras_mamba2.training.restore(lm, backup) == 2 * runs.STEPS_PER_EPOCH
    backup.on_train_end()
    assert all(map(np.array_equal, runs.weights_of(lm), weights))
    assert not (tmp_path / "backup").exists()


def test_two_backups_are_kept_if_asked_for(lm, tmp_path):
    backup = BackupAndRestore(tmp_path, double_checkpoint=True, delete_checkpoint=False)
    fit(lm, backup, epochs=2)
    assert names(tmp_path) == ["00000001", "00000002"]
    weights = tmp_path / "00000002" / "latest.weights.h5"
    weights.write_bytes(weights.read_bytes()[:100])  # of a bad disk: no kill does this
    assert fit(lm, backup, epochs=2) == [1]
    assert names(tmp_path) == ["00000002", "00000003"]


def test_a_damaged_backup_is_an_error(lm, tmp_path):
    backup = BackupAndRestore(tmp_path, delete_checkpoint=False)
    fit(lm, backup, epochs=2)
    (tmp_path / "00000002" / "latest.weights.h5").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="latest.weights.h5 is truncated or damaged"):
        fit(lm, backup)


def test_a_backup_of_keras_is_restored(lm, tmp_path):
    fit(lm, keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False), epochs=3)
    assert fit(lm, BackupAndRestore(tmp_path, delete_checkpoint=False)) == [3]
    metadata = json.loads((tmp_path / "00000001" / "training_metadata.json").read_text())
    assert metadata["epoch"] == EPOCHS


def make_adapted_lm(rank=2, mode=None, dtype=None):
    """Adapters are random, and others each time."""
    lm = runs.make_lm(dtype=dtype)
    if mode:
        lm.quantize(mode)
    lm.backbone.enable_lora(rank)
    rng = np.random.default_rng()
    for variable in lm.trainable_variables:
        variable.assign(0.1 * rng.normal(size=variable.shape))
    lm.compile(optimizer=keras.optimizers.Adam(1e-2), weighted_metrics=[])
    return lm


@pytest.mark.parametrize("mode", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_adapters_go_on_as_if_never_stopped(tmp_path, mode):
    lm = make_adapted_lm(mode=mode)
    fit(lm, BackupAndRestore(tmp_path / "kept", delete_checkpoint=False), epochs=2)
    at_backup = runs.weights_of(lm)
    fit(lm, BackupAndRestore(tmp_path / "other"), epochs=2)
    in_the_end = runs.weights_of(lm)

    lm.set_weights([np.ones_like(weight) for weight in in_the_end])  # as a new process
    backup = BackupAndRestore(tmp_path / "kept")
    keras_mamba2.training.restore(lm, backup)
    assert all(map(np.array_equal, runs.weights_of(lm), at_backup))
    assert fit(lm, backup) == [2, 3]
    assert all(map(np.array_equal, runs.weights_of(lm), in_the_end))
    assert not all(map(np.array_equal, at_backup, in_the_end))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_adapters_go_on_in_another_dtype(tmp_path, dtypes):
    values = {}
    for dtype in dtypes:
        lm = make_adapted_lm(dtype=dtype)
        backup = BackupAndRestore(tmp_path, delete_checkpoint=False)
        if not values:
            fit(lm, backup, epochs=1)
        else:
            keras_mamba2.training.restore(lm, backup)
        values[dtype] = {
            v.path: np.float32(keras.ops.convert_to_numpy(v)) for v in lm.backbone.weights
        }
    first, second = values.values()
    assert all(first[path].shape == second[path].shape for path in first)
    for path, value in first.items():
        np.testing.assert_allclose(second[path], value, rtol=2**-8, err_msg=path)


def test_weights_that_are_cut_between_processes_are_refused():
    """Before the first step; `whole` is on each process."""
    whole = SimpleNamespace(is_fully_addressable=False, is_fully_replicated=True)
    part = SimpleNamespace(is_fully_addressable=False, is_fully_replicated=False)
    variables = [SimpleNamespace(path=f"w{i}", value=v) for i, v in enumerate((whole, part))]
    backup = BackupAndRestore("never_written")
    backup.set_model(SimpleNamespace(variables=variables))
    with pytest.raises(ValueError, match="'w1' is cut between processes.*OrbaxCheckpoint"):
        backup.on_train_begin()


def test_a_backup_with_other_adapters_is_refused(tmp_path):
    """Without them, too, and one of Keras, which has them merged."""
    lm = make_adapted_lm()
    fit(lm, BackupAndRestore(tmp_path / "ours", delete_checkpoint=False), epochs=1)
    fit(lm, keras.callbacks.BackupAndRestore(tmp_path / "keras", delete_checkpoint=False), epochs=1)
    other_rank, without = make_adapted_lm(rank=3), runs.make_lm()
    for model, folder, message in (
        (without, "ours", "with 2 LoRA adapters, this one has no LoRA adapters"),
        (other_rank, "ours", "Call `enable_lora` as before"),
        (other_rank, "keras", "no LoRA adapters, this one has 2 LoRA adapters.*of Keras"),
    ):
        before = runs.weights_of(model)
        with pytest.raises(ValueError, match=message):
            keras_mamba2.training.restore(model, BackupAndRestore(tmp_path / folder))
        assert all(map(np.array_equal, runs.weights_of(model), before))
    (tmp_path / "ours" / "00000001" / "adapters.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="adapters.npz is truncated or damaged"):
        keras_mamba2.training.restore(lm, BackupAndRestore(tmp_path / "ours"))


def test_weights_without_their_epoch_are_no_backup(lm, tmp_path):
    """What a process leaves that died while it wrote: never a new file beside an old one."""
    backup = BackupAndRestore(tmp_path, delete_checkpoint=False)
    fit(lm, backup, epochs=1)
    cut = tmp_path / ".00000002.abcd_123.unfinished" / "new" / "00000002"
    shutil.copytree(tmp_path / "00000001", cut)
    (cut / "training_metadata.json").unlink()
    assert fit(lm, backup, epochs=2) == [1]
    assert names(tmp_path) == ["00000002"]


def test_the_former_name_warns(tmp_path):
    with pytest.warns(DeprecationWarning, match="training.BackupAndRestore"):
        backup = keras_mamba2.training.SharedBackupAndRestore(tmp_path)
    assert isinstance(backup, BackupAndRestore)
