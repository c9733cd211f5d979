"""Private parts of Keras and KerasHub are there, and do what this package takes them for.

Each test has the name of a function in `keras_mamba2/_compat`, so that one which fails with a new
version says what to look at. The modules are loaded one by one, without the package, which cannot
be imported where a part that it needs at once is gone.
"""

import ast
import functools
import importlib.util
import inspect
import json
import pathlib
import pkgutil
import sys

import grain
import h5py
import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

COMPAT = pathlib.Path(__file__).parents[1] / "keras_mamba2" / "_compat"


@functools.cache
def part(name):
    """The module `name` of `_compat`."""
    spec = importlib.util.spec_from_file_location(f"compat_alone.{name}", COMPAT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def private_names():
    """What `_compat` imports from inside Keras and KerasHub, and what it takes from that."""
    for file in sorted(COMPAT.glob("*.py")):
        tree, modules = ast.parse(file.read_text()), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and ".src" in f".{node.module}":
                modules.update({alias.name: f"{node.module}.{alias.name}" for alias in node.names})
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
                yield modules[ast.unparse(node.value)], node.attr


@pytest.mark.parametrize(
    ("module", "name"), sorted(set(private_names())), ids=lambda part: part.rsplit(".", 1)[-1]
)
def test_the_private_name_is_there(module, name):
    assert hasattr(importlib.import_module(module), name)


def functions():
    for file in sorted(COMPAT.glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield node


@pytest.mark.parametrize("function", list(functions()), ids=lambda node: node.name)
def test_each_function_has_a_test_and_a_version(function):
    assert f"test_{function.name}" in globals()
    documentation = " ".join(ast.get_docstring(function).split())
    assert "Written for Keras 3.15." in documentation or (
        "Written for KerasHub 0.32." in documentation
    )


# Variables


@pytest.fixture
def without_value():
    with part("keras_variables").keep_pending_initializations():
        with keras.StatelessScope(initialize_variables=False):
            return keras.Variable("ones", shape=(3,), dtype="float32")


def test_has_value(without_value):
    assert not part("keras_variables").has_value(without_value)
    assert part("keras_variables").has_value(keras.Variable([1.0]))


def test_initialize(without_value):
    part("keras_variables").initialize(without_value, np.array([1, 2, 3], "float32"))
    np.testing.assert_array_equal(without_value.numpy(), [1, 2, 3])
    without_value.assign([3.0, 2.0, 1.0])
    np.testing.assert_array_equal(without_value.numpy(), [3, 2, 1])


def test_initialize_deferred(without_value):
    part("keras_variables").initialize_deferred(without_value)
    np.testing.assert_array_equal(without_value.numpy(), [1, 1, 1])
    with pytest.raises(ValueError, match="already initialized"):
        part("keras_variables").initialize_deferred(without_value)


def test_take_value():
    variable = keras.Variable([1.0, 2.0])
    part("keras_variables").take_value(variable, "it is gone")
    assert not part("keras_variables").has_value(variable)
    ways = [
        lambda: variable.value,
        lambda: variable.numpy(),
        lambda: variable + 1,
        lambda: variable.assign([3.0, 4.0]),
        lambda: part("keras_variables").initialize(variable, [3.0, 4.0]),
    ]
    for way in ways:
        with pytest.raises(ValueError, match="it is gone"):
            way()


def test_pending_initializations():
    pending = part("keras_variables").pending_initializations
    assert not pending()
    with keras.StatelessScope():
        variable = keras.Variable("ones", shape=(3,), dtype="float32")
        assert [id(v) for v in pending()] == [id(variable)]
    assert not pending()
    assert part("keras_variables").has_value(variable)


def test_keep_pending_initializations():
    with keras.StatelessScope():
        kept = keras.Variable("ones", shape=(3,), dtype="float32")
        with part("keras_variables").keep_pending_initializations():
            forgotten = keras.Variable("ones", shape=(3,), dtype="float32")
    assert part("keras_variables").has_value(kept)
    assert not part("keras_variables").has_value(forgotten)


def test_never_autocast():
    dtypes = []

    class Index(keras.layers.Layer):
        def build(self, input_shape):
            self.index = self.add_weight((3,), "ones", dtype="float32")

        def call(self, x):
            value = keras.ops.convert_to_tensor(self.index)
            dtypes.append(keras.backend.standardize_dtype(value.dtype))
            return x

    layer = Index(dtype="mixed_bfloat16")
    layer(np.ones(3))
    part("keras_variables").never_autocast(layer.index)
    layer(np.ones(3))
    assert dtypes == ["bfloat16", "float32"]


# Layers


def test_flatten_layers():
    inner = keras.Sequential([keras.layers.Dense(2, name="a"), keras.layers.Dense(2, name="b")])
    outer = keras.Sequential([keras.Input((2,)), inner, keras.layers.Dense(2, name="c")])
    flatten_layers = part("keras_layers").flatten_layers
    names = [layer.name for layer in flatten_layers(outer) if isinstance(layer, keras.layers.Dense)]
    assert sorted(names) == ["a", "b", "c"]
    assert flatten_layers(outer)[0] is outer
    assert flatten_layers(outer, include_self=False) == flatten_layers(outer)[1:]


def dense():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    return layer


def test_unlocked():
    layer = dense()
    with part("keras_layers").unlocked(layer):
        layer.add_weight(name="new", shape=())
    assert [variable.name for variable in layer.variables] == ["kernel", "bias", "new"]
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        layer.add_weight(name="newer", shape=())


def test_int4_block_size():
    size = part("keras_layers").int4_block_size
    assert size(keras.layers.Dense(3)) is None
    assert size(keras.layers.Dense(3, dtype="int4/16_from_float32")) == 16
    assert size(keras.layers.Dense(3, dtype="int4/-1_from_float32")) is None
    config = keras.quantizers.Int4QuantizationConfig
    assert size(keras.layers.Dense(3), config(block_size=8)) == 8
    assert size(keras.layers.Dense(3), config(block_size=-1)) is None


def test_own_policy():
    """In a map Keras names the policy of a layer after the map, and takes its mode for another."""
    policies = {name: keras.DTypePolicy(name) for name in ("bfloat16", "float16")}
    policies = keras.dtype_policies.DTypePolicyMap("float32", policies)
    layer = keras.layers.Dense(3, dtype=policies, name="bfloat16")
    layer.build((None, 4))
    assert layer.dtype_policy.name == "map_float32"
    with part("keras_layers").own_policy(layer):
        assert layer.dtype_policy.name == "bfloat16"
        layer.quantize("int8")
    assert layer.dtype_policy is policies
    names = {path: policy.name for path, policy in policies.items()}
    assert names == {"bfloat16": "int8_from_bfloat16", "float16": "float16"}
    layer = keras.layers.Dense(3, dtype="float16")
    with part("keras_layers").own_policy(layer):
        layer.dtype_policy = "bfloat16"
    assert layer.dtype_policy.name == "bfloat16"


def test_is_chosen():
    is_chosen, layer = part("keras_layers").is_chosen, keras.layers.Dense(3, name="in_proj")
    assert is_chosen(layer, None)
    assert is_chosen(layer, "proj")
    assert is_chosen(layer, ["out_proj", "in"])
    assert not is_chosen(layer, "out_proj")
    assert not is_chosen(layer, lambda layer: layer.name == "out_proj")


def test_has_equal_groups():
    def found(dtype, size=32):
        layer = keras.layers.Dense(4, dtype=dtype)
        layer.build((None, size))
        return part("keras_layers").has_equal_groups(layer, size)

    assert found("int4/16_from_float32")
    assert found("int4/16_from_float32", 8)
    assert not found("int4/16_from_float32", 40)
    assert not found("int4/-1_from_float32")


def test_keras_mask():
    x = keras.layers.Embedding(3, 2, mask_zero=True)(np.array([[1, 0, 2]]))
    np.testing.assert_array_equal(part("keras_layers").keras_mask(x), [[True, False, True]])
    assert part("keras_layers").keras_mask(keras.ops.ones((1, 2))) is None


def test_untrack_variable():
    layer = dense()
    part("keras_layers").untrack_variable(layer, layer.bias)
    assert [variable.name for variable in layer.variables] == ["kernel"]


def test_stored_kernel():
    layer = dense()
    stored_kernel = part("keras_layers").stored_kernel
    assert stored_kernel(layer) is layer.weights[0]
    layer.enable_lora(2)
    assert stored_kernel(layer).shape == (4, 3)
    assert keras.backend.standardize_dtype(stored_kernel(layer).dtype) == "float32"
    layer = dense()
    layer.quantize("int8")
    assert keras.backend.standardize_dtype(stored_kernel(layer).dtype) == "int8"


def test_stored_embeddings():
    layer = keras.layers.Embedding(5, 4)
    layer.build()
    stored_embeddings = part("keras_layers").stored_embeddings
    assert stored_embeddings(layer) is layer.weights[0]
    layer.quantize("int8")
    assert keras.backend.standardize_dtype(stored_embeddings(layer).dtype) == "int8"


# Training


class Regression(keras.Model):
    """A small model that keeps the arguments of `evaluate`."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.evaluated = []

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)

    def evaluate(self, *args, **kwargs):
        self.evaluated.append(kwargs)
        return super().evaluate(*args, **kwargs)


DATA = np.ones((6, 2)), np.ones((6, 1))


def test_batches_trained():
    model = Regression()
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=2), loss="mse")
    model.fit(*DATA, batch_size=1, verbose=0)
    assert part("keras_training").batches_trained(model.optimizer) == 6
    assert int(model.optimizer.iterations) == 3, "the public number counts batches too"
    inner = keras.optimizers.SGD()
    model.compile(keras.optimizers.LossScaleOptimizer(inner), loss="mse")
    model.fit(*DATA, batch_size=2, verbose=0)
    assert part("keras_training").batches_trained(model.optimizer) == 3
    assert int(model.optimizer._iterations) == 0, "a scaled optimizer counts by itself too"


def test_evaluates_within_fit():
    model = Regression()
    model.compile("sgd", loss="mse")
    model.fit(*DATA, validation_data=DATA, verbose=0)
    model.evaluate(*DATA, verbose=0)
    within, alone = model.evaluated
    assert part("keras_training").evaluates_within_fit(within)
    assert not part("keras_training").evaluates_within_fit(alone)


def fit_with(callback):
    model = Regression()
    model.build((None, 2))
    model.compile("sgd", loss="mse")
    model.fit(*DATA, verbose=0, callbacks=[callback])


def test_backup_paths(tmp_path):
    callback = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    paths = part("keras_training").backup_paths(callback)
    assert not any(pathlib.Path(path).exists() for path in paths)
    fit_with(callback)
    assert {pathlib.Path(path) for path in paths} == set(tmp_path.iterdir())


def test_begin_at_initial_epoch(tmp_path):
    model = Regression()
    model.compile("sgd", loss="mse")
    for epochs in (2, 3):
        callback = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
        model.fit(*DATA, verbose=0, epochs=epochs, callbacks=[callback])
    assert model.fit(*DATA, verbose=0, epochs=3).epoch == [2], "Keras leaves it"
    part("keras_training").begin_at_initial_epoch(model)
    assert model.fit(*DATA, verbose=0, epochs=3).epoch == [0, 1, 2]


def test_backup_at(tmp_path):
    callback = keras.callbacks.BackupAndRestore(tmp_path / "first", delete_checkpoint=False)
    before = part("keras_training").backup_paths(callback)
    others = str(tmp_path / "other.weights.h5"), str(tmp_path / "other.json")
    with part("keras_training").backup_at(callback, *others):
        fit_with(callback)
    assert all(pathlib.Path(path).is_file() for path in others)
    assert not any(pathlib.Path(path).exists() for path in before)
    assert part("keras_training").backup_paths(callback) == before


# Saving


@pytest.mark.parametrize("answer", [True, False])
def test_ask_to_overwrite(tmp_path, monkeypatch, answer):
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "ny"[answer])
    assert part("keras_saving").ask_to_overwrite(tmp_path / "a.keras") is answer
    assert "a.keras" in asked[0]


def test_saved_tensors(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    model.save_weights(tmp_path / "a.weights.h5")
    written = {}
    with h5py.File(tmp_path / "a.weights.h5") as file:
        file.visititems(
            lambda name, item: written.update({name: item[()]} if hasattr(item, "shape") else {})
        )
    found = part("keras_saving").saved_tensors(model)
    assert set(found) == set(written)
    assert len(found) == 4
    for name, variable in found.items():
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), written[name])
    left = part("keras_saving").saved_tensors(model, skipped=model.layers[:1])
    assert len(left) == 2


# Trees


def test_register_pytree():
    class Pair:
        def __init__(self, a, b):
            self.a, self.b = a, b

        def tree_flatten(self):
            return (self.a, self.b), None

        @classmethod
        def tree_unflatten(cls, metadata, children):
            return cls(*children)

        def torchtree_flatten(self):
            return [self.a, self.b], None

        @classmethod
        def torchtree_unflatten(cls, children, metadata):
            return cls(*children)

    assert len(keras.tree.flatten(Pair(1, 2))) == 1
    part("trees").register_pytree(Pair)
    assert keras.tree.flatten(Pair(1, [2, 3])) == [1, 2, 3]
    mapped = keras.tree.map_structure(lambda leaf: leaf + 1, Pair(1, 2))
    assert (type(mapped), mapped.a, mapped.b) == (Pair, 2, 3)
    if keras.config.backend() == "jax":
        import jax

        assert jax.tree.leaves(Pair(1, 2)) == [1, 2]


# Models of KerasHub


def small_backbone():
    inputs = {"token_ids": keras.Input((None,), dtype="int32", name="token_ids")}
    x = keras.layers.Embedding(9, 4)(inputs["token_ids"])
    outputs = keras.layers.Dense(4, name="query")(x)
    return keras_hub.models.Backbone(inputs=inputs, outputs=outputs)


def weighty_layers(backbone):
    layers = part("keras_layers").flatten_layers(backbone, include_self=False)
    return [layer for layer in layers if layer.weights]


def test_set_lora_layers(tmp_path):
    backbone = small_backbone()
    query = backbone.get_layer("query")
    query.enable_lora(2)
    index = weighty_layers(backbone).index(query)
    part("keras_hub_models").set_lora_layers(backbone, [index], 2)
    query.lora_kernel_b.assign(np.ones((2, 4)))
    backbone.save_lora_weights(tmp_path / "a.lora.h5")
    query.lora_kernel_b.assign(np.zeros((2, 4)))
    backbone.load_lora_weights(tmp_path / "a.lora.h5")
    np.testing.assert_array_equal(query.lora_kernel_b, np.ones((2, 4)))
    # KerasHub's own `enable_lora` numbers layers likewise.
    other = small_backbone()
    other.enable_lora(2, target_layer_names=["query"])
    other.load_lora_weights(tmp_path / "a.lora.h5")
    np.testing.assert_array_equal(other.get_layer("query").lora_kernel_b, np.ones((2, 4)))


def test_lora_rank():
    backbone = small_backbone()
    backbone.enable_lora(3, target_layer_names=["query"])
    assert part("keras_hub_models").lora_rank(backbone) == 3
    part("keras_hub_models").set_lora_layers(backbone, [], None)
    assert part("keras_hub_models").lora_rank(backbone) is None


# Preprocessing of KerasHub


def test_in_tf_function():
    in_tf_function = part("keras_hub_preprocessing").in_tf_function
    found = []
    tf.function(lambda: found.append(in_tf_function()))()
    assert (found, in_tf_function()) == ([True], False)


def test_uses_tensorflow():
    uses_tensorflow = part("keras_hub_preprocessing").uses_tensorflow
    layer = keras_hub.layers.StartEndPacker(4)
    found = []
    tf.function(lambda: found.append(uses_tensorflow(layer)))()
    assert (found, uses_tensorflow(layer)) == ([True], False)


def test_preprocessing_function():
    seen = []

    def strings(self, inputs):
        seen.append(inputs)
        return inputs

    def labelled(self, x, y=None, sample_weight=None):
        seen.append((x, y))
        return x, y, sample_weight

    decorate = part("keras_hub_preprocessing").preprocessing_function
    assert decorate(strings)(None, ["a", "b"]) == ["a", "b"]
    assert seen[0].dtype == tf.string
    x, y, weights = decorate(labelled)(None, "a", [1, 2])
    assert (x, np.asarray(y).tolist(), weights) == ("a", [1, 2], None)
    assert keras.ops.is_tensor(seen[1][1])
    ragged = decorate(lambda self, inputs: tf.ragged.constant([[1, 2], [3]]))(None, "a")
    assert ragged == [[1, 2], [3]]


def test_convert_preprocessing_outputs_python():
    convert = part("keras_hub_preprocessing").convert_preprocessing_outputs_python
    converted = convert({"ids": np.array([1, 2], "int32"), "text": "a"})
    assert keras.ops.is_tensor(converted["ids"])
    assert converted["text"] == "a"
    dataset = grain.MapDataset.source([np.array([1, 2])])
    layer = keras_hub.layers.StartEndPacker(4)
    assert isinstance(dataset.map(layer)[0], np.ndarray), "inside grain"


def test_canonicalize_python_string_inputs():
    canonicalize = part("keras_hub_preprocessing").canonicalize_python_string_inputs
    assert canonicalize("a") == (["a"], False, None)
    assert canonicalize(["a", b"\xc3\xa9"]) == (["a", "é"], True, None)
    assert canonicalize(np.array(["a"])) == (["a"], True, None)
    assert canonicalize(tf.constant(["a"])) == (["a"], True, None)
    texts, is_batch, shape = canonicalize([["a", "b"], ["c"]])
    assert (texts, is_batch) == (["a", "b", "c"], True)
    assert shape is not None


def test_restore_outer_shape():
    canonicalize = part("keras_hub_preprocessing").canonicalize_python_string_inputs
    restore = part("keras_hub_preprocessing").restore_outer_shape
    for nested in ([["a", "b"], ["c"]], [["a", "b"], ["c", "d"]]):
        texts, _, shape = canonicalize(nested)
        assert restore([[text] for text in texts], shape) == [
            [[text] for text in row] for row in nested
        ]


def test_canonicalize_python_token_inputs():
    canonicalize = part("keras_hub_preprocessing").canonicalize_python_token_inputs
    assert canonicalize(3) == ([[3]], False)
    assert canonicalize([3, 4]) == ([[3, 4]], False)
    assert canonicalize([[3, 4], [5]]) == ([[3, 4], [5]], True)
    assert canonicalize(np.array([[3], [4]], "int32")) == ([[3], [4]], True)
    assert canonicalize(keras.ops.convert_to_tensor([3, 4])) == ([[3, 4]], False)
    assert canonicalize(tf.ragged.constant([[3, 4], [5]])) == ([[3, 4], [5]], True)


@keras.saving.register_keras_serializable(package="test_compat")
class Words(keras_hub.tokenizers.Tokenizer):
    """A tokenizer without a way to tokenize."""

    def __init__(self, vocabulary=None, **kwargs):
        super().__init__(**kwargs)
        self.vocabulary = vocabulary

    def load_preset_assets(self, preset):
        self.vocabulary = {"a": 0}

    def get_vocabulary(self):
        return self.vocabulary

    def token_to_id(self, token):
        return self.vocabulary[token] if self.vocabulary else None


def test_add_special_token():
    tokenizer = Words()
    part("keras_hub_preprocessing").add_special_token(tokenizer, "<e>", "end_token")
    assert tokenizer.end_token == "<e>"
    assert tokenizer.end_token_id is None
    assert tokenizer.special_tokens == ["<e>"]


def test_update_special_token_ids():
    tokenizer = Words()
    part("keras_hub_preprocessing").add_special_token(tokenizer, "<e>", "end_token")
    tokenizer.vocabulary = {"a": 0}
    with pytest.raises(ValueError, match="<e>"):
        part("keras_hub_preprocessing").update_special_token_ids(tokenizer)
    tokenizer.vocabulary = {"a": 0, "<e>": 1}
    part("keras_hub_preprocessing").update_special_token_ids(tokenizer)
    assert (tokenizer.end_token_id, tokenizer.special_token_ids) == (1, [1])


# Presets of KerasHub


@pytest.fixture
def restored_preset_utils(monkeypatch):
    """Takes back what a test changes in KerasHub's registries."""
    from keras_hub.src.utils import preset_utils

    for name in ("BUILTIN_PRESETS", "BUILTIN_PRESETS_FOR_BACKBONE"):
        monkeypatch.setattr(preset_utils, name, getattr(preset_utils, name).copy())
    for name, module in list(sys.modules.items()):
        if name.startswith("keras_hub.") and "get_preset_loader" in vars(module):
            monkeypatch.setattr(module, "get_preset_loader", module.get_preset_loader)


@pytest.fixture
def preset(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "of another library"}')
    return str(tmp_path)


def test_register_presets(preset, restored_preset_utils):
    class Backbone(keras_hub.models.Backbone):
        pass

    presets = {"a_name": {"metadata": {}, "kaggle_handle": preset}}
    part("keras_hub_presets").register_presets(presets, Backbone)
    assert list(Backbone.presets) == ["a_name"]
    assert part("keras_hub_presets").check_file_exists("a_name", "config.json")


def test_check_file_exists(preset):
    check_file_exists = part("keras_hub_presets").check_file_exists
    assert check_file_exists(preset, "config.json")
    assert not check_file_exists(preset, "task.json")


def test_load_json(preset):
    config = part("keras_hub_presets").load_json(preset, "config.json")
    assert config == {"model_type": "of another library"}


class Asked(Exception):
    pass


def test_ask_for_loader(preset, restored_preset_utils):
    asked = []

    def find(preset):
        asked.append(preset)
        raise Asked

    part("keras_hub_presets").ask_for_loader(find)
    part("keras_hub_presets").ask_for_loader(find)
    for kind in (
        keras_hub.models.CausalLM,
        keras_hub.models.TextClassifier,
        keras_hub.models.Backbone,
        keras_hub.models.CausalLMPreprocessor,
        keras_hub.tokenizers.Tokenizer,
    ):
        with pytest.raises(Asked):
            kind.from_preset(preset)
    assert asked == [preset] * 5


def test_ask_for_loader_leaves_to_keras_hub_what_nobody_knows(preset, restored_preset_utils):
    part("keras_hub_presets").ask_for_loader(lambda preset: None)
    with pytest.raises(ValueError, match="of another library"):
        keras_hub.models.Backbone.from_preset(preset)


def test_preset_loader():
    """It builds a task from what the methods that it leaves open load."""
    asked = []

    class Loader(part("keras_hub_presets").PresetLoader):
        def load_backbone(self, cls, load_weights, **kwargs):
            asked.append((cls, load_weights, kwargs))
            return "backbone"

        def load_tokenizer(self, cls, **kwargs):
            asked.append((cls, kwargs))
            return "tokenizer"

    class Preprocessor(keras_hub.models.CausalLMPreprocessor):
        tokenizer_cls = Words

        def __init__(self, tokenizer, sequence_length):
            self.made_of = tokenizer, sequence_length

    class Task:
        backbone_cls, preprocessor_cls = keras_hub.models.Backbone, Preprocessor

        def __init__(self, **kwargs):
            self.made_of = kwargs

    loader = Loader("name", {"model_type": "x"})
    assert (loader.preset, loader.config) == ("name", {"model_type": "x"})
    preprocessor = loader.load_preprocessor(Preprocessor, sequence_length=7)
    assert preprocessor.made_of == ("tokenizer", 7)
    assert asked.pop() == (Words, {})
    task = loader.load_task(Task, True, False, preprocessor=None, dtype="bfloat16", num_classes=2)
    assert task.made_of == {"backbone": "backbone", "preprocessor": None, "num_classes": 2}
    assert asked == [(keras_hub.models.Backbone, True, {"dtype": "bfloat16"})]


class Family(keras_hub.models.Backbone):
    """Backbones of two classes, of which a task names one."""

    def __init__(self, **kwargs):
        x, dense = keras.Input((3,)), keras.layers.Dense(2)
        super().__init__(inputs=x, outputs=dense(x), **kwargs)


@keras.saving.register_keras_serializable(package="test_compat")
class One(Family):
    pass


@keras.saving.register_keras_serializable(package="test_compat")
class Other(Family):
    pass


@pytest.fixture
def other(tmp_path):
    backbone = Other()
    backbone.save_to_preset(str(tmp_path / "other"))
    return backbone, str(tmp_path / "other")


def test_load_task(other):
    class Task:
        backbone_cls, preprocessor_cls = One, None

        def __init__(self, backbone, num_classes):
            self.made_of = backbone, num_classes

    backbone, preset = other
    load_task = part("keras_hub_presets").load_task
    loaded, num_classes = load_task(Task, Family, preset, True, num_classes=4).made_of
    assert (type(loaded), num_classes) == (Other, 4)
    assert all(map(np.array_equal, loaded.get_weights(), backbone.get_weights()))
    with pytest.raises(ValueError, match="Task has no place for the backbone of .*, a Other"):
        load_task(Task, One, preset, True)


def test_keras_preset_loader(other):
    """It tells of another class, and loads what was saved."""
    backbone, preset = other
    config = part("keras_hub_presets").load_json(preset, "config.json")
    loader = part("keras_hub_presets").KerasPresetLoader(preset, config, One)
    assert loader.check_backbone_class() is One
    loaded = loader.load_backbone(One, True)
    assert type(loaded) is Other
    assert all(map(np.array_equal, loaded.get_weights(), backbone.get_weights()))


def test_load_backbone(other):
    backbone, preset = other
    load_backbone = part("keras_hub_presets").load_backbone
    loaded = load_backbone(Family, preset, True)
    assert type(loaded) is Other
    assert all(map(np.array_equal, loaded.get_weights(), backbone.get_weights()))
    assert not np.array_equal(
        load_backbone(Other, preset, False).get_weights()[0], loaded.get_weights()[0]
    )
    with pytest.raises(ValueError, match="is a Other, not a One"):
        load_backbone(One, preset, True)


def test_load_tokenizer(other, tmp_path):
    load_tokenizer = part("keras_hub_presets").load_tokenizer
    _, preset = other
    config = keras.saving.serialize_keras_object(Words(dtype="int32"))
    (pathlib.Path(preset) / "tokenizer.json").write_text(json.dumps(config))
    assert load_tokenizer(Words, (One, Other), preset).compute_dtype == "int32"
    assert load_tokenizer(Words, Family, preset, dtype="int64").compute_dtype == "int64"
    with pytest.raises(ValueError, match="Words has no place for the backbone of .*, a Other"):
        load_tokenizer(Words, One, preset)


def test_load_preprocessor(other):
    class Preprocessor:
        def __init__(self, **kwargs):
            self.made_of = kwargs

        @classmethod
        def _add_missing_kwargs(cls, loader, kwargs):
            return {"tokenizer": loader.preset, **kwargs}

    _, preset = other
    load_preprocessor = part("keras_hub_presets").load_preprocessor
    loaded = load_preprocessor(Preprocessor, Family, preset, sequence_length=7)
    assert loaded.made_of == {"tokenizer": preset, "sequence_length": 7}
    with pytest.raises(ValueError, match="Preprocessor has no place for the backbone of"):
        load_preprocessor(Preprocessor, One, preset)


# Overridden methods

OVERRIDDEN = part("overridden").OVERRIDDEN


@pytest.mark.parametrize(
    ("base", "name", "signature"),
    OVERRIDDEN,
    ids=[f"{entry.base.rsplit('.', 1)[-1]}.{entry.name}" for entry in OVERRIDDEN],
)
def test_overridden_methods_have_their_arguments(base, name, signature):
    assert str(inspect.signature(getattr(pkgutil.resolve_name(base), name))) == signature


def recording(base, asked, *names):
    """A subclass of `base` whose methods `names` add to `asked` that they were called."""

    def recorded(name):
        def method(self, *args, **kwargs):
            asked.append(name)
            return getattr(super(cls, self), name)(*args, **kwargs)

        return method

    cls = type(base.__name__, (base,), {name: recorded(name) for name in names})
    return cls


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("int8", ("_int8_build", "_int8_call", "_get_kernel_with_merged_lora")),
        ("int4", ("_int4_call", "_get_kernel_with_merged_lora")),
    ],
)
def test_dense_calls_what_is_overridden(mode, names):
    asked = []
    layer = recording(keras.layers.Dense, asked, *names)(3)
    layer.build((None, 4))
    layer.quantize(mode, type_check=False)
    layer(np.ones((1, 4), "float32"))
    layer.enable_lora(2)
    layer.save_own_variables({})
    assert asked == [*names]


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_reversible_embedding_calls_what_is_overridden(mode):
    asked = []

    def call(self, inputs, reverse=False):
        asked.append(reverse)
        return inputs

    base = keras.layers.ReversibleEmbedding
    layer = type("ReversibleEmbedding", (base,), {f"_{mode}_call": call})(5, 4)
    layer.build()
    layer.quantize(mode, type_check=False)
    layer(np.ones((1, 3), "int32"))
    layer(np.ones((3, 4), "float32"), reverse=True)
    assert asked == [False, True]


def test_backup_and_restore_calls_what_is_overridden(tmp_path):
    asked = []
    fit_with(recording(keras.callbacks.BackupAndRestore, asked, "_save_model")(tmp_path))
    assert asked == ["_save_model"]


@pytest.mark.parametrize(
    "base", [keras_hub.models.CausalLMPreprocessor, keras_hub.models.TextClassifierPreprocessor]
)
def test_preprocessors_call_what_is_overridden(base):
    asked = []

    class Preprocessor(base):
        def _call_python(self, *args, **kwargs):
            asked.append("_call_python")

        def _call_tf(self, *args, **kwargs):
            asked.append("_call_tf")

        def _generate_preprocess_python(self, *args, **kwargs):
            asked.append("_generate_preprocess_python")

    preprocessor = Preprocessor(Words())
    preprocessor.call("a")
    tf.function(lambda: preprocessor.call("a"))()
    assert asked == ["_call_python", "_call_tf"]
    if base is keras_hub.models.CausalLMPreprocessor:
        preprocessor.generate_preprocess("a")
        assert asked[2:] == ["_generate_preprocess_python"]


def test_what_is_overridden_is_listed():
    import keras_mamba2

    listed = {(pkgutil.resolve_name(entry.base), entry.name) for entry in OVERRIDDEN}
    package = keras_mamba2.__name__
    for info in pkgutil.walk_packages(keras_mamba2.__path__, f"{package}."):
        if keras.config.backend() != "jax" and info.name.rsplit(".", 1)[-1].startswith("ssd_"):
            continue  # on JAX only
        module = importlib.import_module(info.name)
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != info.name:
                continue
            bases = [base for base in cls.__mro__ if base.__module__.startswith("keras")]
            bases = [base for base in bases if not base.__module__.startswith(package)]
            for name in vars(cls):
                if not name.startswith("_") or name.startswith("__"):
                    continue
                found = [base for base in bases if name in vars(base)]
                assert not found or any((base, name) in listed for base in found), (
                    f"{cls.__name__}.{name} overrides a private method of {found[0]}"
                )
