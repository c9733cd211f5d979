"""Arguments of backbones and tokenizers: named, before weights are made."""

import numpy as np
import pytest

from keras_mamba2 import Mamba2Backbone
from keras_mamba2 import Mamba2HybridBackbone
from keras_mamba2 import Mamba2Tokenizer
from keras_mamba2.models.mamba2_tokenizer import byte_vocabulary
from tests import bad_values
from tests.bad_values import NAN
from tests.bad_values import NO_BOOLEAN
from tests.bad_values import NO_DTYPE
from tests.bad_values import NO_NUMBER
from tests.bad_values import NO_OPTIONAL_SIZE
from tests.bad_values import NO_PAIR
from tests.bad_values import NO_POSITIVE
from tests.bad_values import NO_RATE
from tests.bad_values import NO_SIZE
from tests.bad_values import NO_STRING
from tests.bad_values import named

OF_BOTH = {
    "vocabulary_size": NO_SIZE,
    "hidden_dim": NO_SIZE,
    "layer_norm_epsilon": NO_POSITIVE,
    "residual_in_fp32": NO_BOOLEAN,
    "tie_word_embeddings": NO_BOOLEAN,
    "unpadded_vocabulary_size": [*NO_OPTIONAL_SIZE, 33],
    "dropout": NO_RATE,
    "remat": NO_BOOLEAN,
    "dtype": [*NO_DTYPE, "int8", "int32", "bool"],
    "name": [3, b"a"],
    "trainable": ["x", 1, None],
}
OF_PURE = {
    "num_layers": NO_SIZE,
    "state_dim": NO_SIZE,
    "head_dim": [*NO_SIZE, 3],
    "num_groups": [*NO_SIZE, 3],
    "expansion": [*NO_POSITIVE, 1e-9],
    "conv_kernel_size": NO_SIZE,
    "chunk_size": NO_OPTIONAL_SIZE,
    "use_bias": NO_BOOLEAN,
    "use_conv_bias": NO_BOOLEAN,
    "time_step_limit": NO_PAIR,
    "time_step_min": [*NO_POSITIVE, 0.2],
    "time_step_max": NO_POSITIVE,
    "time_step_floor": [*NO_NUMBER, -1e-5],
    "a_initializer_range": [*NO_PAIR, None, (-1, 1)],
}
OF_HYBRID = {
    "blocks": ["mamba2", [3], None, [], [None], ["mamba"], 3, {"mamba2": 1}],
    "sublayers": [
        None,
        [],
        "mamba2",
        {"mamba2": 3},
        {"mamba2": None},
        {"mamba2": {"kind": "mamba"}},
        {"mamba2": {"kind": ["mamba2"]}},
        {"mamba2": {"state_dim": 0}},
        {"mamba2": {"head_dim": 4, "input_multiplier": NAN}},
    ],
    "embedding_multiplier": NO_NUMBER,
    "residual_multiplier": NO_NUMBER,
    "logits_multiplier": NO_NUMBER,
}
PURE = {"vocabulary_size": 32, "num_layers": 1, "hidden_dim": 8, "state_dim": 4, "head_dim": 4}
HYBRID = {
    "vocabulary_size": 32,
    "hidden_dim": 8,
    "blocks": ["mamba2"],
    "sublayers": {"mamba2": {"state_dim": 4, "head_dim": 4}},
}
UNKNOWN = ["hiden_dim", "num_heads", "vocab_size", "inputs", "sequence_length", "compile"]


@named(OF_BOTH | OF_PURE)
def test_of_a_backbone(name, value):
    bad_values.assert_argument_refused(Mamba2Backbone, name, **PURE | {name: value})


@named(OF_BOTH | {key: OF_HYBRID[key] for key in ("embedding_multiplier", "logits_multiplier")})
def test_of_a_hybrid(name, value):
    bad_values.assert_argument_refused(Mamba2HybridBackbone, name, **HYBRID | {name: value})


@named({key: OF_HYBRID[key] for key in ("blocks", "sublayers", "residual_multiplier")})
def test_of_the_blocks_of_a_hybrid(name, value):
    # Or of an argument of a sublayer.
    match = "`blocks`|`sublayers|sublayer|multiplier|state_dim"
    bad_values.assert_refused(Mamba2HybridBackbone, **HYBRID | {name: value}, match=match)


@pytest.mark.parametrize("keyword", UNKNOWN)
def test_unknown_keywords(keyword):
    for cls, arguments in ((Mamba2Backbone, PURE), (Mamba2HybridBackbone, HYBRID)):
        match = f"`{cls.__name__}` has no argument `{keyword}`"
        bad_values.assert_refused(cls, **arguments, **{keyword: 1}, match=match)


def test_unknown_keywords_of_sublayers():
    sublayers = {"mamba2": {"stat_dim": 4}}
    match = "`Mamba2Mixer` has no argument `stat_dim`. Did you mean 'state_dim'"
    bad_values.assert_refused(
        Mamba2HybridBackbone, **HYBRID | {"sublayers": sublayers}, match=match
    )


def test_numbers_of_numpy_are_numbers(tmp_path):
    arguments = {name: np.int64(value) for name, value in PURE.items()}
    arguments |= {"dropout": np.float32(0.5), "use_bias": np.bool_(False)}
    Mamba2Backbone(**arguments).save_to_preset(tmp_path / "preset")
    config = Mamba2Backbone.from_preset(tmp_path / "preset").get_config()
    assert {name: config[name] for name in arguments} == {**PURE, "dropout": 0.5, "use_bias": False}


@pytest.fixture(scope="module")
def backbone():
    return Mamba2Backbone(**PURE)


@named(
    {
        "rank": NO_SIZE,
        "target_layer_names": ["in_proj", 3, [3], [], ["in_prj"], [None], {"in_proj": 1}],
    }
)
def test_of_lora(backbone, name, value):
    match = f"`{name}` must|{name}="
    bad_values.assert_refused(backbone.enable_lora, **{"rank": 2, name: value}, match=match)


@named({"batch_size": NO_SIZE, "max_length": NO_OPTIONAL_SIZE})
def test_of_a_first_state(backbone, name, value):
    arguments = {"batch_size": 1, name: value}
    bad_values.assert_argument_refused(backbone.initial_state, name, **arguments)


@pytest.mark.parametrize("state", ["x", 3, [], (), np.zeros(3)], ids=repr)
def test_of_a_state(backbone, state):
    token_ids = np.ones((1, 2), "int32")
    match = "`state` must be a `Mamba2State`.*Received: state="
    bad_values.assert_refused(backbone.call_with_state, token_ids, state, match=match)
    bad_values.assert_refused(backbone.step, token_ids[0], state, match=match)
    bad_values.assert_refused(
        type(backbone.initial_state(1)).concatenate, [state], match="`states`"
    )


@pytest.mark.parametrize("n", NO_SIZE, ids=repr)
def test_how_often_a_state_is_repeated(backbone, n):
    bad_values.assert_argument_refused(backbone.initial_state(1).repeat, "n", n=n)


@pytest.mark.parametrize("config", [3, {}, []], ids=repr)
def test_of_a_quantization(backbone, config):
    with pytest.raises(ValueError, match="config"):
        backbone.quantize(config=config)


VOCABULARY = byte_vocabulary("<|endoftext|>")


@named(
    {
        "vocabulary": [3, [1], "nowhere.json", {"a": "b"}, {"a": -1}, {3: 1}, {"a": 1.5}],
        "merges": [3, [3], [None], "nowhere.txt", {"a b": 1}, ["a"], ["a b c"], ["a \u2603"]],
        "tokenizer": [3, [], {}, b"x", "nowhere.json"],
        "start_token": NO_STRING,
        "end_token": NO_STRING,
        "pad_token": NO_STRING,
        "dtype": ["float32", "x", 3],
    }
)
def test_of_a_tokenizer(name, value):
    data = {} if name == "tokenizer" else {"vocabulary": VOCABULARY, "merges": []}
    # Of a merge rule, and of a file of the library, in their own words.
    match = f"`{name}` must be.*Received: .*{name}=|merge rule|nowhere"
    bad_values.assert_refused(Mamba2Tokenizer, **data | {name: value}, match=match)


@pytest.mark.parametrize("keyword", ["vocab", "start_tokens", "add_prefix_space"])
def test_unknown_keywords_of_a_tokenizer(keyword):
    match = f"`Mamba2Tokenizer` has no argument `{keyword}`"
    bad_values.assert_refused(Mamba2Tokenizer, **{keyword: 1}, match=match)
    with pytest.raises(ValueError, match=match):
        Mamba2Tokenizer.from_preset("mamba2_tiny_shakespeare", **{keyword: 1})


TEXTS = [
    None,
    3,
    NAN,
    ...,
    [None],
    ["a", 3],
    "\ud800",
    ["a", "b\udfff"],
    b"\xff\xfe",
    [b"ok", b"\xc3"],
    np.zeros((2, 3)),
    {"a": 1},
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[:30])
def test_texts_that_are_none(byte_tokenizer, text):
    with pytest.raises(ValueError, match="A text must be.*Received: inputs="):
        byte_tokenizer(text)


@pytest.mark.parametrize(
    "ids",
    [None, "a", ["a"], [None], 1.5, [1.5], [[1.5]], [-1], [[1], [-1]], NAN, [257], [2**31], ...],
    ids=ascii,
)
def test_ids_that_are_none(byte_tokenizer, ids):
    with pytest.raises(ValueError, match="Token ids must be (integers|below 257).*Received: "):
        byte_tokenizer.detokenize(ids)


@pytest.mark.parametrize("id", [1.5, "a", None, True, -1, 257, 2**40], ids=repr)
def test_an_id_that_is_none(byte_tokenizer, id):
    bad_values.assert_argument_refused(byte_tokenizer.id_to_token, "id", id=id)


@pytest.mark.parametrize("token", [3, None, b"a", ["a"], "no such token"], ids=repr)
def test_a_token_that_is_none(byte_tokenizer, token):
    bad_values.assert_argument_refused(byte_tokenizer.token_to_id, "token", token=token)
