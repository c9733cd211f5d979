"""Checkpoints that transformers wrote, in both formats, against what transformers computes."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file

import keras_mamba2
from keras_mamba2 import conversion
from tests.conversion import checkpoints
from tests.conversion.checkpoints import load


@pytest.fixture(scope="module", params=checkpoints.GRID)
def model(request):
    return checkpoints.random_model(request.param)


@pytest.mark.parametrize("name", checkpoints.GRID)
def test_logits_are_those_of_transformers(name, tmp_path):
    """The float32 error, root mean square over three draws, is at most twice transformers' own.

    Not the largest error of one draw, which was seen at 0.2 to 7 times transformers'. It does not
    come from the SSD, since no chunk size changes it; of the operations outside, only matrix
    products differ: XLA's had 1.6 times the error of MKL's in a product of 1536 terms.
    """
    squares, their_squares = 0.0, 0.0
    for seed in range(3):
        model = checkpoints.random_model(name, seed)
        backbone = load(checkpoints.save_transformers(model, tmp_path / str(seed)))
        truth = checkpoints.torch_logits_in_float64(model)
        error = checkpoints.logits_of(backbone) - truth
        their_error = checkpoints.torch_logits(model) - truth
        assert max(np.abs(error).max(), np.abs(their_error).max()) < 1e-5 * np.abs(truth).max()
        squares += np.mean(error**2)
        their_squares += np.mean(their_error**2)
    assert np.sqrt(squares / their_squares) <= 2


def test_formats_agree_bit_for_bit(model, tmp_path):
    ours = load(checkpoints.save_transformers(model, tmp_path / "model"))
    original = load(checkpoints.save_state_spaces(model, tmp_path / "original"))
    checkpoints.assert_same_weights(ours, original)
    limits = [backbone.time_step_limit for backbone in (ours, original)]
    assert limits[0] == limits[1]


@pytest.fixture(scope="module")
def plain():
    return checkpoints.random_model()


@pytest.fixture
def folder(plain, tmp_path):
    return checkpoints.save_transformers(plain, tmp_path / "model")


@pytest.fixture
def backbone(folder):
    return load(folder)


def rewrite(folder, change):
    """Changes the tensors in a file by `change(dict)`."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def test_sharded_is_the_same(plain, backbone, tmp_path):
    sharded = checkpoints.save_transformers(plain, tmp_path / "sharded", max_shard_size="5KB")
    assert not (sharded / "model.safetensors").exists()
    checkpoints.assert_same_weights(backbone, load(sharded))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed_bfloat16"])
def test_weights_are_cast_to_the_variables(plain, folder, dtype):
    backbone = load(folder, dtype=dtype)
    kernel = backbone.blocks[0].mixer.in_proj.kernel
    assert kernel.dtype == ("float32" if dtype == "mixed_bfloat16" else dtype)
    expected = plain.backbone.layers[0].mixer.in_proj.weight.detach().T
    actual = torch.from_numpy(kernel.numpy().astype("float32"))
    assert torch.equal(actual, expected.to(getattr(torch, kernel.dtype)).float())
    assert backbone.blocks[0].mixer.A_log.dtype == "float32"


def test_unused_and_missing_weights_are_listed_and_nothing_changes(folder, backbone):
    def change(tensors):
        tensors["backbone.layers.0.mixer.extra"] = torch.ones(3)
        del tensors["backbone.norm_f.weight"]
        tensors["backbone.embeddings.weight"] *= 2

    before = checkpoints.weights_of(backbone)
    rewrite(folder, change)
    message = r"(?s)without a place in the model: backbone.layers.0.mixer.extra\n.*"
    message += r"missing in the files: backbone.norm_f.weight"
    with pytest.raises(ValueError, match=message):
        conversion.load_weights(backbone, folder)
    after = checkpoints.weights_of(backbone)
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_shapes_that_differ_are_told(folder, backbone):
    rewrite(
        folder, lambda t: t.update({"backbone.layers.1.mixer.conv1d.weight": torch.ones(48, 4)})
    )
    message = r"conv1d.weight: \(48, 4\) in model.safetensors, \(48, 1, 4\) in the model \(block_1"
    with pytest.raises(ValueError, match=message):
        conversion.load_weights(backbone, folder)


def test_a_vocabulary_without_its_padding_is_padded(plain, folder, backbone):
    name = "backbone.embeddings.weight"
    rewrite(folder, lambda t: t.update({name: t[name][:45].contiguous()}))
    conversion.load_weights(backbone, folder)
    embeddings = backbone.token_embedding.embeddings.numpy()
    assert np.array_equal(embeddings[:45], plain.backbone.embeddings.weight.detach()[:45])
    assert not embeddings[45:].any()


def test_a_vocabulary_with_more_rows_is_explained(folder, backbone):
    name = "backbone.embeddings.weight"
    rewrite(folder, lambda t: t.update({name: torch.ones(64, 16)}))
    with pytest.raises(ValueError, match="16 rows more.*vocabulary_size=64"):
        conversion.load_weights(backbone, folder)


def test_what_is_not_finite_is_counted_and_nothing_changes(folder, backbone):
    def change(tensors):
        tensors["backbone.norm_f.weight"][:3] = torch.nan
        tensors["backbone.layers.0.mixer.D"][1] = torch.inf
        tensors["backbone.embeddings.weight"] *= 2

    before = checkpoints.weights_of(backbone)
    rewrite(folder, change)
    message = r"mixer.D \(1 infinite of 4 in float32\), backbone.norm_f.weight \(3 NaN of 16 in"
    with pytest.raises(ValueError, match=message):
        conversion.load_weights(backbone, folder)
    after = checkpoints.weights_of(backbone)
    assert all(np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.parametrize(
    ("stored", "dtype", "value"),
    [(torch.float64, "float32", 1e39), (torch.float32, "float16", 7e4)],
)
def test_a_number_too_large_for_the_variables_is_refused(folder, stored, dtype, value):
    def change(tensors):
        name = "backbone.embeddings.weight"
        tensors[name] = tensors[name].to(stored)
        tensors[name][2, 3] = value

    rewrite(folder, change)
    with pytest.raises(ValueError, match=f"embeddings.weight .1 infinite of 768 in {dtype}"):
        load(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_integers_are_no_weights(folder, backbone, dtype):
    name = "backbone.norm_f.weight"
    rewrite(folder, lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(ValueError, match=rf"not floating point numbers: {name} \("):
        conversion.load_weights(backbone, folder)


def test_a_tied_head_must_be_the_embedding(folder, backbone):
    embedding = "backbone.embeddings.weight"
    rewrite(folder, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    conversion.load_weights(backbone, folder)
    rewrite(folder, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        conversion.load_weights(backbone, folder)


def test_an_untied_model_needs_its_head(folder):
    arguments = conversion.constructor_arguments(
        {**checkpoints.SMALL, "model_type": "mamba2", "tie_word_embeddings": False}
    )
    with pytest.raises(ValueError, match="missing in the files: lm_head.weight"):
        conversion.load_weights(keras_mamba2.Mamba2Backbone(**arguments), folder)
