"""The classifier reads each row at its last real token, wherever the row and its padding are."""

import inspect

import jax
import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from keras_hub.src.tests.test_case import TestCase

import keras_mamba2
from keras_mamba2.models.mamba2_tokenizer import byte_vocabulary
from keras_mamba2.tasks.batch_checks import check_labels
from tests import reference
from tests.conversion import checkpoints

EPS = np.finfo(np.float32).eps
PAD = 9
SMALL = {"num_layers": 2, "hidden_dim": 16, "state_dim": 4, "head_dim": 8, "chunk_size": 4}
ROWS = [[1, 2, 3, 4, 5], [6, 7], [8, 1, 2], [3]]


class Mamba2TextClassifierTest(TestCase):
    def setUp(self):
        tokenizer = keras_mamba2.Mamba2Tokenizer(byte_vocabulary("<|endoftext|>"), [])
        self.preprocessor = keras_mamba2.Mamba2TextClassifierPreprocessor(tokenizer, 8)
        self.init_kwargs = {
            "backbone": keras_mamba2.Mamba2Backbone(257, **SMALL | {"num_layers": 1}),
            "preprocessor": self.preprocessor,
            "num_classes": 3,
            "hidden_dim": 4,
            "dropout": 0.1,
            "activation": "softmax",
        }
        self.train_data = (["airplane", "plane", "car"], [2, 1, 0])

    @pytest.mark.slow
    def test_classifier_basics(self):
        self.run_task_test(
            cls=keras_mamba2.Mamba2TextClassifier,
            init_kwargs=self.init_kwargs,
            train_data=self.train_data,
            expected_output_shape=(3, 3),
        )

    def test_saved_model(self):
        self.run_model_saving_test(
            cls=keras_mamba2.Mamba2TextClassifier,
            init_kwargs=self.init_kwargs,
            input_data=self.preprocessor(*self.train_data)[0],
        )


def inputs_of(rows, sides):
    """Rows as `(b t)`, each padded on its side with ids that no row has."""
    t = max(map(len, rows)) + 2
    token_ids, mask = np.full((len(rows), t), PAD), np.zeros((len(rows), t), "int32")
    for i, (row, side) in enumerate(zip(rows, sides, strict=True)):
        start = {"left": t - len(row), "both": 1, "right": 0}[side]
        token_ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return {"token_ids": token_ids, "padding_mask": mask}


@pytest.fixture(scope="module")
def classifier():
    backbone = keras_mamba2.Mamba2Backbone(10, **SMALL)
    classifier = keras_mamba2.Mamba2TextClassifier(backbone, num_classes=3)
    reference.randomize(classifier)
    return classifier


def truth_of(classifier, row):
    """The logits of a row alone, in float64."""
    config, weights = classifier.backbone.get_config(), reference.weights_of(classifier.backbone)
    hidden, _ = reference.backbone(np.array([row]), weights, config)
    return reference.dense(hidden[0, -1], reference.weights_of(classifier), "logits")


def test_every_row_has_the_logits_it_has_alone(classifier):
    truth = np.stack([truth_of(classifier, row) for row in ROWS])
    for order, sides in (
        ([0, 1, 2, 3], ["right"] * 4),
        ([0, 1, 2, 3], ["left"] * 4),
        ([2, 0, 3, 1], ["left", "both", "right", "both"]),
    ):
        logits = classifier.predict(inputs_of([ROWS[i] for i in order], sides), verbose=0)
        assert np.abs(logits - truth[order]).max() <= 16 * EPS * np.abs(truth).max()  # 3 is usual
    assert np.ptp(truth, axis=0).min() > 0.1  # the rows differ


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_gradient_reaches_padding(classifier, side):
    inputs = inputs_of(ROWS, [side] * len(ROWS))
    variables = [v.value for v in classifier.trainable_variables]
    others = [v.value for v in classifier.non_trainable_variables]

    @jax.jit
    @jax.grad
    def gradients(variables):
        logits, _ = classifier.stateless_call(variables, others, inputs)
        return ops.sum(ops.square(logits))

    paths = [v.path for v in classifier.trainable_variables]
    of_embeddings = gradients(variables)[paths.index("token_embedding/embeddings")]
    reached = np.abs(of_embeddings).max(axis=1) > 0
    np.testing.assert_array_equal(np.flatnonzero(~reached), [0, PAD])  # 0 is in no row


def test_a_row_without_tokens_is_refused_and_finite(classifier):
    inputs = inputs_of([[1, 2], []], ["right", "right"])
    assert np.isfinite(ops.convert_to_numpy(classifier(inputs))).all()
    with pytest.raises(ValueError, match="Row 1 has no tokens"):
        classifier.predict(inputs)
    with pytest.raises(ValueError, match="Row 1 has no tokens"):
        classifier.fit(inputs, np.array([0, 1]))


def test_ids_outside_the_vocabulary_are_named(classifier):
    size = classifier.backbone.vocabulary_size
    inputs = inputs_of([[1, 2], [3, size]], ["right", "right"])
    message = f"Token ids.*vocabulary_size={size}. Received: {size} in row 1"
    for use in (classifier.predict, lambda x: classifier.fit(x, np.array([0, 1]))):
        with pytest.raises(ValueError, match=message):
            use(inputs)


def test_the_names_of_transformers_are_taken(classifier):
    x, y = inputs_of(ROWS, ["right"] * len(ROWS)), np.zeros(len(ROWS))
    theirs = {"input_ids": x["token_ids"], "attention_mask": x["padding_mask"]}
    np.testing.assert_array_equal(
        classifier.predict(theirs, verbose=0), classifier.predict(x, verbose=0)
    )
    assert classifier.evaluate(theirs, y, verbose=0) == classifier.evaluate(x, y, verbose=0)
    classifier.train_on_batch(theirs, y)


@pytest.fixture(scope="module")
def small(byte_tokenizer):
    preprocessor = keras_mamba2.Mamba2TextClassifierPreprocessor(
        byte_tokenizer, 8, add_end_token=False
    )
    backbone = keras_mamba2.Mamba2Backbone(257, **SMALL | {"num_layers": 1})
    return keras_mamba2.Mamba2TextClassifier(backbone, 3, preprocessor)


TEXTS = ["a", "b", "c"]


def train_on_dataset(model, texts, labels):
    import tensorflow as tf

    model.fit(tf.data.Dataset.from_tensor_slices((texts, labels)).batch(3), verbose=0)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, y: model.fit(TEXTS, y),
        lambda model, y: model.fit(TEXTS, [0, 1, 2], validation_data=(TEXTS, y)),
        lambda model, y: model.evaluate(TEXTS, np.array(y)),
        lambda model, y: model.train_on_batch(TEXTS, y),
        lambda model, y: train_on_dataset(model, TEXTS, y),
    ],
    ids=["fit", "validation", "evaluate", "batch", "dataset"],
)
def test_labels_out_of_range_are_named(small, use):
    before = [ops.convert_to_numpy(v) for v in small.weights]
    with pytest.raises(Exception, match="num_classes=3. Received: 3 in row 1") as error:
        use(small, [0, 3, 1])
    # Inside of `tf.data`, TensorFlow wraps what is raised.
    assert error.type.__name__ in ("ValueError", "InvalidArgumentError")
    for old, new in zip(before, small.weights, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(new))


def test_labels_are_those_of_the_loss(small):
    """One-hot labels, and a class that the loss leaves out, are no mistakes."""
    model = keras_mamba2.Mamba2TextClassifier(small.backbone, 3, small.preprocessor)
    model.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True), metrics=None)
    model.evaluate(TEXTS, np.eye(3)[[0, 2, 1]], verbose=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    model.compile(loss=loss, metrics=None)
    model.evaluate(TEXTS, [0, -1, 2], verbose=0)
    with pytest.raises(ValueError, match="Received: -2 in row 0"):
        model.evaluate(TEXTS, [-2, -1, 2])
    with pytest.raises(ValueError, match="Labels must be numbers.*dtype=<U3"):
        model.evaluate(TEXTS, ["one", "two", "two"])


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_rows_of_no_weight_need_no_label(small, shape):
    labels, weights = np.array([0, -1, 2]), np.array([1.0, 0.0, 1.0])
    for use in (small.evaluate, small.fit):
        use(TEXTS, labels.reshape(shape), sample_weight=weights, verbose=0)
    weights_too = {"sample_weight": weights.reshape(shape)}
    assert np.isfinite(small.train_on_batch(TEXTS, labels, **weights_too)).all()
    with pytest.raises(ValueError, match="Received: -1 in row 1"):
        small.fit(TEXTS, labels.reshape(shape), sample_weight=weights[::-1] + 1)


def test_the_loss_is_that_of_the_outputs(small):
    """Without `compile` too: the mean of `-log p` of the labels, for any activation."""
    y = np.array([0, 2, 1])
    for activation in (None, "softmax"):
        model = keras_mamba2.Mamba2TextClassifier(
            small.backbone, 3, small.preprocessor, activation=activation
        )
        model.output_dense.set_weights([10 * w for w in small.output_dense.get_weights()])
        p = model.predict(TEXTS, verbose=0)
        p = p if activation else ops.convert_to_numpy(ops.softmax(p))
        loss = model.evaluate(TEXTS, y, verbose=0)[0]
        np.testing.assert_allclose(loss, -np.log(p[range(3), y]).mean(), rtol=16 * EPS)


def test_empty_texts_are_named_in_a_pipeline(small):
    with pytest.raises(Exception, match="Row 1 has no tokens.*add_end_token=True"):
        small.predict(["a", ""], verbose=0)


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"num_classes": 2, "hidden_dim": -1}])
def test_bad_arguments_are_named(small, arguments):
    name, value = list(arguments.items())[-1]
    with pytest.raises(ValueError, match=f"{name}={value}"):
        keras_mamba2.Mamba2TextClassifier(small.backbone, **arguments)


def test_arguments_of_fit_have_the_order_of_keras_hub(small):
    ours, theirs = (
        [*inspect.signature(cls.fit).parameters]
        for cls in (keras_mamba2.Mamba2TextClassifier, keras_hub.models.TextClassifier)
    )
    assert ours[: len(theirs) - 1] == theirs[:-1]  # before `kwargs`
    texts, labels = ["a", "b"], np.array([0, 1])
    small.fit(texts, labels, 2, None, (texts, labels), verbose=0)
    with pytest.raises(ValueError, match="Labels must be"):
        small.fit(texts, labels, 2, None, (texts, labels + 9), verbose=0)


def test_validation_data_need_labels(small):
    before = small.get_weights()
    with pytest.raises(ValueError, match="Labels are missing"):
        small.fit(TEXTS, np.array([0, 1, 0]), validation_data=(TEXTS,), verbose=0)
    assert all(map(np.array_equal, small.get_weights(), before))


def test_shuffled_texts_and_validation_batches(small, monkeypatch):
    """In another order in each epoch; 8 validation texts in batches of 3."""
    texts, labels = [f"{i} abc" for i in range(8)], [0, 1] * 4  # lists, as in the example
    seen, sizes = [], []
    preprocess = small.preprocess_samples

    def keep(x, y=None, sample_weight=None):
        seen.extend(x if isinstance(x, list) else [])
        sizes.append(len(x))
        return preprocess(x, y, sample_weight)

    monkeypatch.setattr(small, "preprocess_samples", keep)
    validation = (["v"] * 8, labels)
    small.fit(
        texts,
        labels,
        4,
        None,
        validation,
        shuffle=True,
        validation_batch_size=3,
        epochs=2,
        verbose=0,
    )
    read = [text for text in seen if text != "v"]
    assert set(read) == set(texts)
    assert read[:8] != texts or read[8:16] != texts
    assert set(sizes) == {2, 3, 4}


@pytest.mark.parametrize(
    "loss",
    [
        "sparse_categorical_crossentropy",
        "SparseCategoricalCrossentropy",
        keras.losses.sparse_categorical_crossentropy,
        keras.losses.SparseCategoricalCrossentropy,
        keras.losses.SparseCategoricalCrossentropy(),
        ["sparse_categorical_crossentropy"],
    ],
)
def test_labels_are_class_numbers_however_the_loss_is_named(loss):
    check_labels(np.array([0, 1]), loss, 2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        check_labels(np.array([0, 7]), loss, 2)


def same_weights(a, b):
    pairs = zip(a.weights, b.weights, strict=True)
    return all(np.array_equal(*map(ops.convert_to_numpy, pair)) for pair in pairs)


@pytest.mark.parametrize(
    "task", [keras_mamba2.Mamba2TextClassifier, keras_hub.models.TextClassifier]
)
def test_a_language_model_becomes_a_classifier(preset_folder, tmp_path, task):
    classifier = task.from_preset(str(preset_folder), num_classes=4, dropout=0.5)
    assert isinstance(classifier, keras_mamba2.Mamba2TextClassifier)
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    assert same_weights(classifier.backbone, lm.backbone)
    assert classifier.predict(["airplane"], verbose=0).shape == (1, 4)
    classifier.preprocessor.sequence_length = 16

    classifier.save_to_preset(tmp_path / "classifier")
    again = task.from_preset(str(tmp_path / "classifier"))
    assert same_weights(classifier, again)
    assert again.preprocessor.sequence_length == 16
    assert again.dropout == 0.5
    new = task.from_preset(str(tmp_path / "classifier"), num_classes=5)
    assert new.output_dense.kernel.shape == (32, 5)
    assert same_weights(new.backbone, again.backbone)
    # And back: the backbone of a classifier is that of a language model.
    lm = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "classifier")
    assert same_weights(lm.backbone, again.backbone)


@pytest.mark.parametrize("save", [checkpoints.save_transformers, checkpoints.save_state_spaces])
def test_a_checkpoint_becomes_a_classifier(tmp_path, byte_tokenizer, save):
    folder = save(checkpoints.random_model("plain", vocab_size=272), tmp_path / "checkpoint")
    byte_tokenizer.engine.save(str(folder / "tokenizer.json"))
    load = keras_mamba2.Mamba2TextClassifier.from_preset
    classifier = load(folder, num_classes=2)
    assert same_weights(
        classifier.backbone, keras_mamba2.Mamba2Backbone.from_preset(folder, dtype="float32")
    )
    assert np.isfinite(classifier.predict(["a", "bc"], verbose=0)).all()
    with pytest.raises(ValueError, match="checkpoint has no head.*num_classes"):
        load(folder)
    assert load(folder, num_classes=2, preprocessor=None).preprocessor is None


def test_lora_trains_adapters_and_head(small):
    model = keras_mamba2.Mamba2TextClassifier.from_config(small.get_config())
    model.preprocessor = small.preprocessor
    model.backbone.enable_lora(2)
    names = ["logits" if "logits" in v.path else v.name for v in model.trainable_variables]
    assert set(names) == {"lora_kernel_a", "lora_kernel_b", "logits"}
    before = {v.path: ops.convert_to_numpy(v) for v in model.weights}
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    model.fit(TEXTS, [0, 1, 2], epochs=2, verbose=0)
    moved = {v.path for v in model.weights if np.any(before[v.path] != ops.convert_to_numpy(v))}
    assert moved == {v.path for v in model.trainable_variables}


def marked_texts(count, seed):
    """Random letters with one of three marks among them: the class is which."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    texts = []
    for label in labels:
        letters = rng.choice(list("abcdefgh"), size=rng.integers(4, 15))
        letters[rng.integers(len(letters))] = "XYZ"[label]
        texts.append("".join(letters))
    return texts, labels


@pytest.mark.slow
def test_it_learns(byte_tokenizer):
    """What was anywhere in a text is known at its end: texts never seen are classified."""
    keras.utils.set_random_seed(0)
    model = keras_mamba2.Mamba2TextClassifier(
        keras_mamba2.Mamba2Backbone(257, **SMALL),
        num_classes=3,
        preprocessor=keras_mamba2.Mamba2TextClassifierPreprocessor(byte_tokenizer, 16),
    )
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    unseen = marked_texts(200, seed=2)
    assert model.evaluate(*unseen, verbose=0)[1] < 0.6
    model.fit(*marked_texts(400, seed=1), batch_size=40, epochs=16, verbose=0)
    assert model.evaluate(*unseen, verbose=0)[1] > 0.97
