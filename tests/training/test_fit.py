"""`fit` takes data of any form, goes on after any end, and refuses what teaches nothing."""

import csv
import inspect
import json
import pathlib
import re
import signal
import subprocess
import sys

import grain
import jax
import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from keras.callbacks import TerminateOnNaN

import keras_mamba2
from keras_mamba2.training import BackupAndRestore
from tests.training import runs
from tests.training.runs import BATCH_SIZE
from tests.training.runs import TEXTS

ROOT = pathlib.Path(__file__).parents[2]
EPS = np.finfo(np.float32).eps

# Keras says it of every dataset whose length it cannot ask for.
pytestmark = pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")


@pytest.fixture(scope="module")
def shared_lm():
    return runs.make_lm(dropout=0.3)


@pytest.fixture
def lm(shared_lm):
    """One model for most tests, so that its training step is compiled once."""
    before, preprocessor = runs.snapshot(shared_lm), shared_lm.preprocessor
    yield shared_lm
    runs.put_back(before)
    shared_lm.preprocessor = preprocessor


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A process without TensorFlow: the losses that it printed, and the backup of its last run."""
    folder = tmp_path_factory.mktemp("killed") / "backup"
    result = subprocess.run(
        [sys.executable, "-m", "tests.training.runs", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    return json.loads(result.stdout), folder


def forms_of(lm):
    texts = tf.data.Dataset.from_tensor_slices(TEXTS)
    rows = tf.data.Dataset.from_tensor_slices(lm.preprocessor(TEXTS))
    return runs.inputs(lm.preprocessor) | {
        "tf.data": texts.batch(BATCH_SIZE),
        "tf.data rows": rows.batch(BATCH_SIZE),
    }


def assert_same(weights, others):
    for a, b in zip(weights, others, strict=True):
        np.testing.assert_array_equal(a, b)


# Data of any form


def test_the_form_of_the_data_does_not_matter(lm, killed):
    """Losses of training are equal to the last bit, with TensorFlow and without."""
    losses = {name: runs.trained(lm, data)[0] for name, data in forms_of(lm).items()}
    expected = losses["list"]
    assert expected[0] != expected[1]
    assert losses == dict.fromkeys(losses, expected)
    without_tensorflow, _ = killed
    assert without_tensorflow == dict.fromkeys(runs.inputs(lm.preprocessor), expected)


def test_rows_need_no_preprocessor(lm):
    rows = lm.preprocessor(TEXTS)
    expected, _ = runs.trained(lm, rows)
    lm.preprocessor = None
    assert runs.trained(lm, rows)[0] == expected
    with pytest.raises(ValueError, match="Without a `preprocessor`, pass a dict"):
        lm.fit(TEXTS)


def test_evaluate_and_predict_take_the_same(lm):
    forms = forms_of(lm)
    losses = {name: runs.use(lm.evaluate, data) for name, data in forms.items()}
    assert losses == dict.fromkeys(losses, losses["list"])
    x, _, _ = forms["rows"]
    truth = lm.predict(x, batch_size=BATCH_SIZE, verbose=0)
    assert truth.shape == (6, 8, 257)
    for name in ("list", "objects", "grain map", "grain iter", "tf.data"):
        np.testing.assert_array_equal(runs.use(lm.predict, forms[name]), truth)


def test_the_threads_of_a_pipeline_build_one_preprocessor(lm):
    """With a switch between threads at every chance: Keras fails where two build a layer."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(40):
            fresh = keras_mamba2.Mamba2CausalLMPreprocessor(lm.preprocessor.tokenizer, 8)
            list(grain.MapDataset.source(TEXTS * 4).map(fresh).to_iter_dataset())
    finally:
        sys.setswitchinterval(interval)


# What has weight


@pytest.fixture
def rows(lm):
    """Rows of which all but one end in padding, and the last is nothing else."""
    x, y, weights = keras.tree.map_structure(np.array, lm.preprocessor(TEXTS))
    x["padding_mask"][-1], weights[-1] = False, False
    return x, y, weights


def test_padding_teaches_nothing(lm, rows):
    x, y, weights = rows
    losses, trained = runs.trained(lm, rows)
    assert np.isfinite(losses).all()
    rng = np.random.default_rng(0)
    other_ids = np.where(x["padding_mask"], x["token_ids"], rng.integers(257, size=y.shape))
    other_y = np.where(weights, y, -100)
    others = {**x, "token_ids": other_ids}, other_y, weights
    assert (other_ids != x["token_ids"]).any()
    other_losses, other_trained = runs.trained(lm, others)
    assert other_losses == losses
    assert_same(other_trained, trained)


def test_the_padding_mask_gives_the_weights(lm):
    packing = keras_mamba2.Mamba2CausalLMPreprocessor(lm.preprocessor.tokenizer, 8, packing=True)
    x, y, weights = packing(TEXTS)
    assert not weights.all()
    assert len(y) % BATCH_SIZE == 0
    expected, _ = runs.trained(lm, (x, y, weights))
    for data in (
        (x, y),
        tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE),
        grain.MapDataset.source(runs.Rows(x, y)).batch(BATCH_SIZE),
    ):
        assert runs.trained(lm, data)[0] == expected


def test_long_texts_are_cut_before_the_end_token(lm):
    short = [text[:7] for text in TEXTS]
    assert short != TEXTS
    cut = lm.preprocessor([text[:8] for text in TEXTS])
    keras.tree.map_structure(np.testing.assert_array_equal, lm.preprocessor(TEXTS), cut)


# Going on after an end


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(lm, killed, tmp_path):
    """Killed in mid-epoch, with dropout, and data that are shuffled anew in every epoch."""
    _, backup = killed
    before = runs.snapshot(lm)
    expected = runs.shuffled_run(lm, tmp_path / "backup")
    runs.put_back(before)
    assert json.loads((backup / "00000001" / "training_metadata.json").read_text())["epoch"] == 1
    assert_same(runs.shuffled_run(lm, backup), expected)
    assert not backup.exists()  # the run is over


def test_an_interrupted_run_on_texts_goes_on(lm, tmp_path):
    """Texts come in the same order in every epoch, and need nothing but the callbacks."""

    def interrupt(epoch, logs):
        if epoch == 1:
            raise KeyboardInterrupt

    def run(*callbacks):
        callbacks = [keras_mamba2.training.SeedByEpoch(), BackupAndRestore(tmp_path), *callbacks]
        runs.use(lm.fit, TEXTS, epochs=3, callbacks=callbacks)
        return runs.weights_of(lm)

    before = runs.snapshot(lm)
    expected = run()
    runs.put_back(before)
    with pytest.raises(KeyboardInterrupt):
        run(keras.callbacks.LambdaCallback(on_epoch_end=interrupt))
    keras.utils.set_random_seed(1)
    assert_same(run(), expected)


def test_an_interrupted_run_on_packed_rows_goes_on(lm, tmp_path):
    """As the guide to fine-tuning has it: batches of packed rows, each by its number."""
    tokenizer = lm.preprocessor.tokenizer
    lm.preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, 8, packing=True)
    rows = runs.Rows(*lm.preprocessor(TEXTS))
    batches = grain.MapDataset.source(rows).seed(0).shuffle().repeat(3).batch(BATCH_SIZE)
    steps = len(batches) // 3

    def interrupt(epoch, logs):
        if epoch == 1:
            raise KeyboardInterrupt

    def run(*callbacks):
        backup = BackupAndRestore(tmp_path)
        done = keras_mamba2.training.restore(lm, backup)
        runs.use(
            lm.fit,
            batches[done:],
            steps_per_epoch=steps,
            epochs=len(batches) // steps,
            callbacks=[keras_mamba2.training.SeedByEpoch(), backup, *callbacks],
        )
        return done, runs.weights_of(lm)

    before = runs.snapshot(lm)
    _, expected = run()
    runs.put_back(before)
    with pytest.raises(KeyboardInterrupt):
        run(keras.callbacks.LambdaCallback(on_epoch_end=interrupt))
    done, found = run()
    assert done == steps * 2
    assert_same(found, expected)


def test_checkpoints_load_and_go_on(lm, tmp_path):
    """`.keras` files with the optimizer, presets without; logs for people beside them."""
    logs = tmp_path / "logs.csv"
    kwargs = {"validation_data": TEXTS[:2], "epochs": 4}
    seeds = keras_mamba2.training.SeedByEpoch()
    callbacks = [
        seeds,
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: lm.save_to_preset(tmp_path / f"preset_{epoch + 1}")
        ),
        keras.callbacks.CSVLogger(logs),
        keras.callbacks.TensorBoard(tmp_path / "board"),
    ]
    history = runs.use(lm.fit, TEXTS, callbacks=callbacks, **kwargs).history

    loaded = keras.models.load_model(tmp_path / "2.keras")
    rest = runs.use(loaded.fit, TEXTS, initial_epoch=2, callbacks=[seeds], **kwargs).history
    assert rest == {name: values[2:] for name, values in history.items()}
    assert_same(runs.weights_of(loaded), runs.weights_of(lm))

    preset = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "preset_4")
    assert_same(runs.weights_of(preset), runs.weights_of(lm))
    with logs.open() as file:
        assert [float(row["val_loss"]) for row in csv.DictReader(file)] == history["val_loss"]
    assert {path.parent.name for path in tmp_path.glob("board/*/*")} == {"train", "validation"}


def test_nan_ends_training_and_leaves_the_backup(lm, tmp_path):
    """The way out: with an error no later epoch is backed up; run again with what is bearable."""
    far = keras.callbacks.LearningRateScheduler(lambda epoch: 1e30 if epoch else 1e-3)

    def run(*callbacks):
        callbacks = [BackupAndRestore(tmp_path), *callbacks]
        return runs.use(lm.fit, TEXTS, epochs=3, callbacks=callbacks).history["loss"]

    with pytest.raises(RuntimeError, match="NaN or Inf loss encountered at batch 1"):
        run(far, TerminateOnNaN(raise_error=True))
    assert not all(np.isfinite(w).all() for w in runs.weights_of(lm))
    losses = run(TerminateOnNaN(raise_error=True))
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_nan_stops_gently_too(lm):
    batches = []
    far = keras.callbacks.LearningRateScheduler(lambda epoch: 1e30)
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda i, logs: batches.append(i))
    runs.use(lm.fit, TEXTS, epochs=3, callbacks=[far, TerminateOnNaN(), count])
    assert batches == [0, 1]


# Precision and memory


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
def test_reduced_precision_learns_and_is_kept(dtype, tmp_path):
    # Not Adam's own `beta_2=0.999`: in bfloat16 that is 1, and nothing would move.
    lm = runs.make_lm(keras_mamba2.training.adamw_recipe(5e-2, steps=36), dtype=dtype)
    losses = runs.use(lm.fit, TEXTS, epochs=12).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    dtypes = {v.path.rsplit("/")[-1]: v.dtype for v in lm.weights}
    assert {dtypes[name] for name in ("A_log", "dt_bias", "D")} == {"float32"}
    assert dtypes["kernel"] == dtypes["embeddings"] == lm.dtype_policy.variable_dtype
    assert lm.dtype_policy.variable_dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    assert lm.compute_dtype == "bfloat16"

    lm.save_to_preset(tmp_path)
    loaded = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path)
    assert loaded.dtype_policy.name == "float32"  # what is current, not what was
    assert_same(runs.weights_of(loaded), [w.astype("float32") for w in runs.weights_of(lm)])
    loaded = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path, dtype=dtype)
    assert loaded.dtype_policy.name == dtype


def test_gradients_of_two_halves_are_those_of_the_whole():
    """Clipped after they are summed: the law holds for what `adamw_recipe` clips, too."""

    def weights(batch_size, **kwargs):
        lm = runs.make_lm(keras.optimizers.SGD(1.0, global_clipnorm=0.1, **kwargs))
        before = runs.weights_of(lm)
        lm.fit(TEXTS[:4], batch_size=batch_size, verbose=0)
        return before, runs.weights_of(lm)

    before, whole = weights(4)
    _, halves = weights(2, gradient_accumulation_steps=2)
    norm = np.sqrt(sum(np.square(b - a).sum() for a, b in zip(before, whole, strict=True)))
    assert norm == pytest.approx(0.1, rel=1e-3)  # it was clipped
    for a, b in zip(whole, halves, strict=True):
        assert np.abs(a - b).max() <= 16 * EPS * np.abs(a).max()


# Data that teach nothing


def changed(rows, name, value):
    """Rows with one entry of one array changed."""
    x, y, weights = keras.tree.map_structure(np.array, rows)
    {"token_ids": x["token_ids"], "y": y}[name][2, 1] = value
    return x, y, weights


BAD_ROWS = {
    "an id": ({"name": "token_ids", "value": 257}, "Token ids.*vocabulary_size=257.*257 in row 2"),
    "a negative id": ({"name": "token_ids", "value": -1}, "Token ids.*Received: -1 in row 2"),
    "a target": ({"name": "y", "value": 300}, "Labels.*num_tokens=257.*300 in row 2"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_what_is_not_in_the_vocabulary_is_named(lm, rows, change, message):
    """Before a step is made on arrays, and when its batch is read from a dataset."""
    before = runs.weights_of(lm)
    x, y, weights = changed(rows, **change)
    with pytest.raises(ValueError, match=message):
        lm.fit(x, y, sample_weight=weights)
    with pytest.raises(ValueError, match=message):
        lm.fit(*rows[:2], validation_data=(x, y))
    with pytest.raises(ValueError, match=message):
        lm.evaluate(x, y)
    assert_same(runs.weights_of(lm), before)
    if change["name"] == "token_ids":
        with pytest.raises(ValueError, match=message):
            lm.predict(x)
    of_batch = re.sub("row 2", "row 0", message)
    with pytest.raises(ValueError, match=of_batch):
        lm.fit(grain.MapDataset.source(runs.Rows(x, y)).batch(BATCH_SIZE), verbose=0)
    with pytest.raises(tf.errors.InvalidArgumentError, match=of_batch):
        lm.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE), verbose=0)


NOTHING = {
    "no texts": ([], "There is no sample in the data"),
    "empty texts": (["", ""], "No text has two tokens to learn from. Received 2 texts"),
    "tf.data": (tf.data.Dataset.from_tensor_slices(TEXTS[:0]).batch(2), "dataset is empty"),
    "grain map": (grain.MapDataset.source([]).batch(2), "dataset is empty"),
    "grain iter": (grain.MapDataset.source([]).to_iter_dataset().batch(2), "dataset is empty"),
}


@pytest.mark.parametrize(("data", "message"), NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("packing", [False, True])
def test_data_without_a_token_are_refused(lm, data, message, packing):
    tokenizer = lm.preprocessor.tokenizer
    lm.preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, 8, packing=packing)
    for use in (lm.fit, lm.evaluate, lambda data: lm.fit(TEXTS, validation_data=data)):
        with pytest.raises(ValueError, match=message):
            use(data)


def test_rows_without_a_token_or_a_target_are_refused(lm, rows):
    x, y, weights = rows
    nothing = np.zeros_like(y)
    for arguments in (
        ({**x, "padding_mask": nothing}, y),
        (x, y, None, nothing),
        ({**x, "padding_mask": nothing}, y, None, weights),
    ):
        with pytest.raises(ValueError, match="No row has a token to learn from. Received 6 rows"):
            lm.evaluate(*arguments)
    for arguments in ((x,), (x, y[:, :3]), (x, y, weights[:, 0])):
        with pytest.raises(ValueError, match=r"one for each position.*token_ids \(6, 8\), y \("):
            lm.fit(*arguments[:2], sample_weight=arguments[2] if arguments[2:] else None)


WITH_TEXTS = {
    "labels": ({"x": TEXTS, "y": [0] * 6}, "Received: y beside texts"),
    "weights": ({"x": TEXTS, "sample_weight": [1] * 6}, "Received: sample_weight beside texts"),
    "validation": ({"x": TEXTS, "validation_data": (TEXTS, [0] * 6)}, "y beside texts"),
    "tf.data": (
        {"x": tf.data.Dataset.from_tensor_slices((TEXTS, [0] * 6)).batch(2)},
        "y beside texts",
    ),
    "grain": (
        {"x": grain.MapDataset.source([(text, 0) for text in TEXTS]).batch(2)},
        "y beside texts",
    ),
    "beside a dataset to validate": (
        {
            "x": TEXTS,
            "validation_data": (tf.data.Dataset.from_tensor_slices(TEXTS).batch(2), [0] * 6),
        },
        "do not provide `y`",
    ),
    "beside a dataset": (
        {"x": tf.data.Dataset.from_tensor_slices(TEXTS).batch(2), "y": [0] * 6},
        "do not provide `y`",
    ),
}


@pytest.mark.parametrize(("data", "message"), WITH_TEXTS.values(), ids=WITH_TEXTS)
@pytest.mark.parametrize("packing", [False, True])
def test_what_stands_beside_texts_is_not_lost(lm, data, message, packing):
    tokenizer = lm.preprocessor.tokenizer
    lm.preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, 8, packing=packing)
    before = runs.weights_of(lm)
    with pytest.raises(ValueError, match=message):
        lm.fit(**data, verbose=0)
    assert_same(runs.weights_of(lm), before)


@pytest.mark.parametrize("packing", [False, True])
def test_arguments_have_the_places_they_have_in_keras_hub(lm, monkeypatch, packing):
    tokenizer = lm.preprocessor.tokenizer
    preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, 8, packing=packing)
    monkeypatch.setattr(lm, "preprocessor", preprocessor)
    assert (
        lm.fit(TEXTS, None, BATCH_SIZE, verbose=0).params["steps"]
        == len(preprocessor(TEXTS)[1]) // BATCH_SIZE
    )
    for name in ("fit", "evaluate", "predict"):
        ours, theirs = (
            [*inspect.signature(getattr(cls, name)).parameters]
            for cls in (keras_mamba2.Mamba2CausalLM, keras_hub.models.CausalLM)
        )
        assert [n for n in ours if n in theirs] == theirs
        assert ours[: len(theirs) - 1] == theirs[:-1]  # before `kwargs`
    with pytest.raises(ValueError, match="`batch_size` must be"):
        lm.evaluate(*preprocessor(TEXTS))  # the third is not the weights


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.slow
def test_shuffle_is_another_order_in_every_epoch(lm, monkeypatch, packing):
    tokenizer = lm.preprocessor.tokenizer
    preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, 8, packing=packing)
    monkeypatch.setattr(lm, "preprocessor", preprocessor)
    texts = [f"{i:03} abc" for i in range(40)]
    lm.compile(optimizer=keras.optimizers.SGD(0.0), weighted_metrics=[])

    def orders(**kwargs):
        seen = []
        train_step = lm.train_step

        def keep(state, data):
            jax.debug.callback(lambda ids: seen.append(np.array(ids)), data[0]["token_ids"])
            return train_step(state, data)

        monkeypatch.setattr(lm, "train_step", keep)
        lm.train_function = None
        keras.utils.set_random_seed(1)
        lm.fit(texts, batch_size=8, epochs=3, verbose=0, **kwargs)
        jax.effects_barrier()
        monkeypatch.setattr(lm, "train_step", train_step)
        return [np.concatenate(seen[i : i + 5]).tolist() for i in (0, 5, 10)]

    first, second, third = orders(shuffle=True)
    assert first != second != third != first
    assert sorted(first) == sorted(second) == sorted(third)
    assert orders(shuffle=True) == [first, second, third]
    plain = orders()
    assert plain[0] == plain[1] == plain[2]
    assert sorted(plain[0]) == sorted(first)


def test_windows_are_not_for_fit(lm):
    windows = keras_mamba2.training.ConsecutiveWindows(np.arange(1, 200) % 200, 2, 8)
    for use in (lm.fit, lm.evaluate):
        with pytest.raises(ValueError, match="StatefulTraining.*Received: ConsecutiveWindows"):
            use(windows)


def test_shuffle_does_not_go_with_a_split(lm):
    for arguments in ({"shuffle": True}, {"validation_batch_size": 2}):
        with pytest.raises(ValueError, match="validation_split"):
            lm.fit(TEXTS, validation_split=0.5, **arguments)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"batch_size": 2}, 2),
        ({"batch_size": 2, "shuffle": True}, 2),
        ({"batch_size": 2, "validation_batch_size": 3}, 3),
        ({"batch_size": 2, "shuffle": True, "validation_batch_size": 3}, 3),
    ],
)
def test_validation_has_batches_of_the_size_that_is_asked_for(lm, arguments, size):
    lm.compile(optimizer=keras.optimizers.SGD(0.0))
    shapes, test_step = [], lm.test_step

    def keep(state, data):
        shapes.append(data[0]["token_ids"].shape[0])
        return test_step(state, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "test_step", keep)
        lm.test_function = None
        history = lm.fit(TEXTS[:2], verbose=0, validation_data=TEXTS, **arguments).history
    lm.test_function = None
    assert max(shapes) == size < len(TEXTS)
    expected = lm.evaluate(TEXTS, batch_size=size, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose(history["val_loss"], [expected], rtol=1e-5)
