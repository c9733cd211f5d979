import functools
import zipfile

import keras
import keras_hub
import numpy as np
import pytest
import typer.testing
from keras import ops
from keras_hub.src.tests.test_case import TestCase

import keras_mamba2
from keras_mamba2.cli import app
from keras_mamba2.models.mamba2_tokenizer import byte_vocabulary


class Mamba2CausalLMTest(TestCase):
    def setUp(self):
        tokenizer = keras_mamba2.Mamba2Tokenizer(byte_vocabulary("<|endoftext|>"), [])
        self.preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, sequence_length=8)
        backbone = keras_mamba2.Mamba2Backbone(257, 2, 16, state_dim=4, head_dim=8, chunk_size=4)
        self.init_kwargs = {"preprocessor": self.preprocessor, "backbone": backbone}
        self.train_data = (["airplane at airport", "airplane"],)
        self.input_data = self.preprocessor(*self.train_data)[0]

    def test_causal_lm_basics(self):
        self.run_task_test(
            cls=keras_mamba2.Mamba2CausalLM,
            init_kwargs=self.init_kwargs,
            train_data=self.train_data,
            expected_output_shape=(2, 8, 257),
        )

    def test_saved_model(self):
        self.run_model_saving_test(
            cls=keras_mamba2.Mamba2CausalLM,
            init_kwargs=self.init_kwargs,
            input_data=self.input_data,
        )

    def test_an_untied_head_has_its_own_weights(self):
        backbone = keras_mamba2.Mamba2Backbone(
            257, 1, 16, state_dim=4, head_dim=8, tie_word_embeddings=False
        )
        lm = keras_mamba2.Mamba2CausalLM(backbone)
        self.assertEqual(lm(self.input_data).shape, (2, 8, 257))
        self.assertEqual(backbone.token_embedding.reverse_embeddings.shape, (16, 257))


def test_fit_lowers_the_loss(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(optimizer=keras.optimizers.AdamW(1e-2))
    texts = ["to be, or not to be"] * 8
    losses = lm.fit(texts, batch_size=8, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]


@pytest.fixture(scope="module")
def lm():
    """Its embedding has 272 ids, of which the tokenizer has 257."""
    tokenizer = keras_mamba2.Mamba2Tokenizer(byte_vocabulary("<|endoftext|>"), [])
    preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, add_end_token=False)
    backbone = keras_mamba2.Mamba2Backbone(272, 2, 16, state_dim=4, head_dim=8, dropout=0.5)
    return keras_mamba2.Mamba2CausalLM(backbone, preprocessor)


class TestHead:
    def test_perplexity_is_exp_of_the_loss(self, lm):
        text = "to be, or not to be"
        lm.preprocessor.sequence_length = len(text) - 1
        lm.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        loss = lm.evaluate([text], verbose=0, return_dict=True)["loss"]
        assert lm.perplexity(text) == pytest.approx(np.exp(loss), rel=1e-5)
        ids = lm.preprocessor.prompts([text])[0][None]
        scores = lm.score(ids[:, :-1], scoring_mode="loss", target_ids=ids[:, 1:])
        assert float(ops.mean(scores)) == pytest.approx(loss, rel=1e-5)

    def test_everything_masks_what_is_no_token(self, lm):
        ids = np.arange(9)[None]
        inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        stateful = keras_mamba2.training.StatefulTraining(lm, batch_size=1)
        whole = lm(inputs)
        for logits in (lm.call_with_cache(ids, None)[0], lm.score(ids), stateful(inputs), whole):
            probabilities = ops.convert_to_numpy(ops.softmax(logits))
            assert (probabilities[..., 257:] == 0).all()
            np.testing.assert_allclose(probabilities, ops.softmax(whole), atol=1e-6)

    def test_dropout_is_for_training(self, lm):
        ids = np.arange(9)[None]
        inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        whole, dropped = (ops.convert_to_numpy(lm(inputs, training=t)) for t in (False, True))
        assert np.abs(whole - dropped).max() > 0.01

    def test_float16_has_room_for_the_mask(self):
        backbone = keras_mamba2.Mamba2Backbone(272, 1, 16, state_dim=4, head_dim=8, dtype="float16")
        tokenizer = keras_mamba2.Mamba2Tokenizer(byte_vocabulary("<|endoftext|>"), [])
        preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer)
        lm = keras_mamba2.Mamba2CausalLM(backbone, preprocessor)
        assert np.isfinite(ops.convert_to_numpy(lm.score(np.arange(9)[None]))).all()

    def test_labels_that_are_no_tokens_are_refused(self, lm):
        ids = np.arange(9)[None]
        inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        with pytest.raises(ValueError, match="260"):
            lm.fit(inputs, np.full_like(ids, 260), verbose=0)


def test_padding_takes_no_part_in_the_loss(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    texts = ["to be", "or not to be"]
    losses = []
    for length in (16, 31):
        x, y, weight = lm.preprocessor(texts, sequence_length=length)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
            y, lm(x), sample_weight=weight
        )
        losses.append(float(loss) * y.shape[1])  # Keras divides by all positions
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_text_in_text_out(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler="greedy")
    one = lm.generate("hello", max_new_tokens=6)
    assert one.startswith("hello")
    both = lm.generate(["hello", "a longer prompt"], max_new_tokens=6)
    assert both[0] == one
    assert both[1].startswith("a longer prompt")
    new = lm.generate(["hello", "a longer prompt"], max_new_tokens=6, strip_prompt=True)
    assert ["hello" + new[0], "a longer prompt" + new[1]] == both
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(["hello", "a longer prompt"]).batch(1)
    assert lm.generate(dataset, max_new_tokens=6) == both


def test_prompts_that_do_not_fit_are_named(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    with pytest.raises(ValueError, match="Prompt 1 has 40 tokens.*32"):
        lm.generate(["short", "x" * 40])
    with pytest.raises(ValueError, match="Prompt 0 has no tokens.*add_start_token"):
        lm.generate("")
    lm.preprocessor.add_start_token = True
    lm.generate("", max_new_tokens=2)


@pytest.mark.parametrize("task", [keras_mamba2.Mamba2CausalLM, keras_hub.models.CausalLM])
def test_a_saved_preset_is_the_same_model(preset_folder, tmp_path, task):
    lm = task.from_preset(str(preset_folder))
    lm.save_to_preset(tmp_path / "again")
    again = task.from_preset(str(tmp_path / "again"))
    inputs = {"token_ids": np.arange(9)[None], "padding_mask": np.ones((1, 9))}
    np.testing.assert_array_equal(ops.convert_to_numpy(lm(inputs)), again(inputs))
    assert again.preprocessor.sequence_length == lm.preprocessor.sequence_length


def test_a_model_without_a_preprocessor_is_saved_and_loaded(preset_folder, tmp_path):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
    lm.save_to_preset(tmp_path / "bare")
    again = keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "bare")
    assert again.preprocessor is None
    assert all(map(np.array_equal, again.get_weights(), lm.get_weights()))
    with pytest.raises(ValueError, match="no preprocessor to set sequence_length on"):
        keras_mamba2.Mamba2CausalLM.from_preset(tmp_path / "bare", sequence_length=9)
    for load in (
        keras_mamba2.Mamba2Tokenizer.from_preset,
        functools.partial(keras_mamba2.Mamba2TextClassifier.from_preset, num_classes=2),
    ):
        with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
            load(tmp_path / "bare")
    done = typer.testing.CliRunner().invoke(app, ["generate", "a", "--preset", f"{tmp_path}/bare"])
    assert done.exit_code == 2
    assert "has no tokenizer" in done.stderr


IDS = {"token_ids": np.arange(9)[None], "padding_mask": np.ones((1, 9), "int32")}


def test_a_clone_is_compiled_as_the_model(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(keras.optimizers.AdamW(0.5), sampler=keras_mamba2.FilterSampler(top_k=3))
    lm.fit(["to be, or not to be"], verbose=0)
    clone = keras.models.clone_model(lm)
    assert clone.optimizer.get_config() == lm.optimizer.get_config()
    assert clone(IDS).shape == lm(IDS).shape


@pytest.mark.parametrize(
    "sampler", ["greedy", keras_mamba2.FilterSampler(temperature=0.5, min_p=0.1, seed=3)]
)
def test_a_file_of_a_model_says_how_it_samples(preset_folder, tmp_path, sampler):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.save(tmp_path / "auto.keras")
    assert not keras.models.load_model(tmp_path / "auto.keras").has_own_sampler
    lm.compile(sampler=sampler)
    lm.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.has_own_sampler
    assert keras_hub.samplers.serialize(again.sampler) == keras_hub.samplers.serialize(lm.sampler)
    texts = [model.generate("to be", max_new_tokens=20) for model in (lm, again)]
    assert texts[0] == texts[1]


class Unknown(keras_hub.samplers.GreedySampler):
    """That no other process knows."""


def test_a_sampler_that_is_not_known_costs_no_model(preset_folder, tmp_path):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler=Unknown())
    lm.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    parts["config.json"] = parts["config.json"].replace(b"Unknown", b"Forgotten")
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as file:
        for name, content in parts.items():
            file.writestr(name, content)
    with pytest.warns(UserWarning, match="sampler could not be restored"):
        again = keras.models.load_model(tmp_path / "other.keras")
    assert not again.has_own_sampler
    assert all(map(np.array_equal, again.get_weights(), lm.get_weights()))


def test_a_model_of_a_configuration_can_be_called(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    made = keras_mamba2.Mamba2CausalLM.from_config(lm.get_config())
    made.set_weights(lm.get_weights())
    np.testing.assert_array_equal(made(IDS), lm(IDS))


class PresetTest(TestCase):
    @pytest.fixture(autouse=True)
    def _folder(self, preset_folder):
        self.folder = str(preset_folder)

    def test_presets_of_all_classes(self):
        ids = {"token_ids": np.ones((1, 5), "int32"), "padding_mask": np.ones((1, 5), "int32")}
        text = (["airplane"],)
        for cls, data in (
            (keras_mamba2.Mamba2Backbone, ids),
            (keras_mamba2.Mamba2CausalLM, ids),
            (keras_mamba2.Mamba2Tokenizer, text),
            (keras_mamba2.Mamba2CausalLMPreprocessor, text),
        ):
            init_kwargs = {"preprocessor": None} if cls is keras_mamba2.Mamba2CausalLM else {}
            self.run_preset_test(cls, self.folder, data, init_kwargs=init_kwargs)
