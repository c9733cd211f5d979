"""Ids and texts are those of transformers, for the tokenizers of all families."""

import json

import keras
import pytest
import tokenizers
import transformers
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

import keras_mamba2
from keras_mamba2.conversion import generation_defaults
from keras_mamba2.conversion.tokenizer import tokenizer_arguments
from keras_mamba2.host.text_stream import TextStream
from keras_mamba2.host.text_stream import text_after
from tests.chat import templates
from tests.conversion import family_tokenizers
from tests.hub_server import Hub
from tests.hub_server import point_client_to
from tests.hub_server import serving
from tests.tasks import tiny_granite

PIECES = st.sampled_from(
    ["<|im_start|>", "<|start_of_role|>", "<|end_of_text|>", "<s>", "</s>", "<think>", "<0x41>",
     "<unk>", "  ", " ", "\n", "\r\n", "\t", "▁", "Ġ", "We'll", "HTTPServer", "12345", "é",
     "e\u0301", "日本", "🤷🏽", "\u200b", "\x00", "to be", " question", "..."]
)  # fmt: skip
TEXTS = st.text() | st.lists(PIECES).map("".join)
examples = settings(deadline=None, derandomize=True, max_examples=300)


@pytest.fixture(scope="module", params=family_tokenizers.FAMILIES)
def pair(request, tmp_path_factory):
    """Ours and theirs, from the same files."""
    folder = family_tokenizers.save(request.param, tmp_path_factory.mktemp(request.param))
    ours = keras_mamba2.Mamba2Tokenizer(**tokenizer_arguments(folder))
    return ours, transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def test_ids_are_those_of_transformers(pair):
    ours, theirs = pair

    @examples
    @given(text=TEXTS)
    def check(text):
        assert ours(text).tolist() == theirs(text)["input_ids"]

    check()
    assert ours.end_token_id == theirs.eos_token_id
    assert ours.start_token_id == theirs.bos_token_id
    specials = set(theirs.all_special_ids)
    assert specials <= set(ours.control_token_ids)


def test_streamed_text_is_that_of_transformers(pair):
    """Token by token, and several at once, without the tokens that are no text."""
    ours, theirs = pair

    @examples
    @given(text=TEXTS, sizes=st.lists(st.integers(1, 5), min_size=1))
    def check(text, sizes):
        ids = theirs(text)["input_ids"]
        stream, pieces, i = TextStream(ours.detokenize, ours.control_token_ids), [], 0
        while i < len(ids):
            size = sizes[len(pieces) % len(sizes)]
            pieces.append(stream.push(ids[i : i + size]))
            i += size
        expected = theirs.decode(ids, skip_special_tokens=True)
        assert "".join([*pieces, stream.finish()]) == expected
        assert ours.detokenize(ids) == theirs.decode(ids)

    check()


def test_a_conversation_has_no_beginning_but_that_of_its_template(pair):
    ours, theirs = pair
    names = {name: getattr(ours, name) for name in ("start_token", "end_token", "pad_token")}
    template = "{{ messages[0].content }}"
    tokenizer = keras_mamba2.Mamba2Tokenizer(tokenizer=ours.engine, chat_template=template, **names)
    preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer)
    for text in ("To be", "<s>To be", " be", "\nTo"):
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        message = {"role": "user", "content": text}
        assert preprocessor.chat_prompt([message]).tolist() == expected


PARTS = st.text("Tobe,. \n日🤷é'(12", max_size=12)


def test_a_text_that_continues_another_is_the_rest_of_the_whole(pair):
    """Not so in transformers, where tokenizers of sentencepiece put a blank in between."""
    ours, _ = pair
    preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(ours)

    @examples
    @given(first=PARTS.filter(bool), rest=PARTS)
    @example(first="def f(x):\n", rest="   return")
    @example(first=" ", rest=" ")
    def check(first, rest):
        [before] = preprocessor.prompts([first])
        [after] = preprocessor.prompts([rest], continued=True)
        assert text_after(before, after, ours.detokenize, ours.control_token_ids) == rest
        begun = [id for id in before if id not in ours.control_token_ids]
        assert ours.detokenize([*begun, *after]) == ours.detokenize(begun) + rest

    check()


def test_tokens_of_the_configuration_are_added(tmp_path):
    """Some checkpoints name tokens that their tokenizer.json does not have."""
    decoder = {
        "500": {"content": "<new>", "special": True, "normalized": False},
        "501": {"content": "<plain>", "special": False, "lstrip": True},
    }
    config = {"added_tokens_decoder": decoder, "pad_token": "<fill>"}
    folder = family_tokenizers.save("granite", tmp_path, **config)
    ours = keras_mamba2.Mamba2Tokenizer(**tokenizer_arguments(folder))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("a<new>b  <plain> c<fill>", "<|end_of_text|>"):
        assert ours(text).tolist() == theirs(text)["input_ids"]
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.token_to_id("<new>") in ours.control_token_ids


@pytest.mark.parametrize("family", ["granite", "nemotron", "zamba2"])
@pytest.mark.parametrize(
    "config",
    [
        {"additional_special_tokens": ["<new>", "<video>"], "mask_token": "<hidden>"},
        {"image_token": "<image>", "extra_special_tokens": {"video_token": "<video>"}},
        {"extra_special_tokens": ["<video>"], "eos_token": "<the end>"},
        {"add_bos_token": True, "add_eos_token": True},  # of a `tokenizer.json` they say nothing
        {"add_bos_token": False},
    ],
)
def test_special_tokens_however_they_are_named(tmp_path, family, config):
    folder = family_tokenizers.save(family, tmp_path, **config)
    ours = keras_mamba2.Mamba2Tokenizer(**tokenizer_arguments(folder))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("", "a b", "<new>user <hidden>  a<image>b <video><the end>"):
        assert ours(text).tolist() == theirs(text)["input_ids"]


def test_a_token_of_the_vocabulary_is_one_where_the_configuration_names_it(tmp_path):
    """Though `tokenizer.json` does not list it among those that are matched in texts."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "<end>": 2}, []))
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    ours = keras_mamba2.Mamba2Tokenizer(**tokenizer_arguments(tmp_path))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours("ab<end>a").tolist() == theirs("ab<end>a")["input_ids"] == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("config", "added", "message"),
    [
        ({}, {"[PAD]": 2}, r"added tokens such as '\[PAD\]'"),
        ({"added_tokens_decoder": {"2": {"content": "<im>"}}}, {}, "such as '<im>'"),
        ({"tokenizer_class": "Qwen2TokenizerFast"}, {}, "tokenizer_class='Qwen2TokenizerFast'"),
    ],
)
def test_a_vocabulary_that_does_not_tell_all_is_refused(tmp_path, config, added, message):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_arguments(tmp_path)["vocabulary"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ValueError, match=f"{message}.*AutoTokenizer"):
        tokenizer_arguments(tmp_path)


def test_a_large_tokenizer_and_several_ends_of_a_text_are_read(tmp_path):
    """That of Nemotron 3 has 17 MB; Granite's and others' configurations may name several ids."""
    folder = family_tokenizers.save("granite", tmp_path)
    expected = tokenizer_arguments(folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text() + " " * 17_000_000)
    ends = [keras_mamba2.Mamba2Tokenizer(**expected).end_token_id, 1]
    (folder / "config.json").write_text(json.dumps({"eos_token_id": ends}))
    (folder / "tokenizer_config.json").unlink()
    ours = keras_mamba2.Mamba2Tokenizer(**tokenizer_arguments(folder))
    assert ours.end_token_id == ends[0]
    assert generation_defaults(folder) == {"eos_token_id": ends}


def test_the_template_is_read_from_where_transformers_reads_it(tmp_path):
    messages = [{"role": "user", "content": "Hello"}]
    folder = family_tokenizers.save("bamba", tmp_path, chat_template=templates.LLAMA)
    several = [
        {"name": "default", "template": templates.LLAMA},
        {"name": "tool_use", "template": templates.MISTRAL},
    ]

    def check(names):
        template = keras_mamba2.Mamba2Tokenizer(**tokenizer_arguments(folder)).chat_template
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        assert sorted(template.templates) == names
        for tools in (None, []):
            expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
            assert template.render(messages, tools) == expected

    check(["default"])
    family_tokenizers.save("bamba", tmp_path, chat_template=several)
    check(["default", "tool_use"])
    (folder / "chat_template.jinja").write_text(templates.FALCON)
    check(["default"])  # a file hides what the configuration says
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ eos_token }}é")
    check(["default", "tool_use"])


def test_a_checkpoint_without_template_has_none(tmp_path):
    folder = family_tokenizers.save("bamba", tmp_path)
    assert "chat_template" not in tokenizer_arguments(folder)
    family_tokenizers.save("bamba", tmp_path, chat_template=None)
    assert "chat_template" not in tokenizer_arguments(folder)
    family_tokenizers.save("bamba", tmp_path, chat_template=[{"name": "default"}])
    with pytest.raises(ValueError, match="tokenizer_config.json: `chat_template` must be"):
        tokenizer_arguments(folder)


@pytest.mark.parametrize("family", family_tokenizers.FAMILIES)
def test_a_preset_keeps_tokenizer_and_template(family, tmp_path):
    several = {"default": templates.NEMOTRON, "tool_use": templates.MISTRAL}
    config = [{"name": name, "template": template} for name, template in several.items()]
    folder = family_tokenizers.save(family, tmp_path, chat_template=config)
    tokenizer = keras_mamba2.Mamba2Tokenizer(**tokenizer_arguments(folder))
    preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(
        tokenizer, generation_defaults={"eos_token_id": [1, 2], "top_p": 0.9, "do_sample": True}
    )
    backbone = keras_mamba2.Mamba2Backbone(
        vocabulary_size=tokenizer.num_ids, num_layers=1, hidden_dim=8, head_dim=4, state_dim=4
    )
    lm = keras_mamba2.Mamba2CausalLM(backbone, preprocessor)
    lm.save_to_preset(tmp_path / "keras")
    lm.save(tmp_path / "model.keras")
    lm.export_to_transformers(tmp_path / "transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "transformers")
    messages = [{"role": "user", "content": "Hi 12345 <think> é"}]
    ids = theirs.apply_chat_template(messages, tools=[], add_generation_prompt=True)["input_ids"]
    config = json.loads((tmp_path / "transformers" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [1, 2]
    load = keras_mamba2.Mamba2CausalLM.from_preset
    for loaded in (
        load(tmp_path / "keras").preprocessor,
        load(tmp_path / "transformers").preprocessor,
        keras_mamba2.Mamba2CausalLMPreprocessor.from_preset(tmp_path / "keras"),
        keras.saving.load_model(tmp_path / "model.keras").preprocessor,
    ):
        assert loaded.generation_defaults == preprocessor.generation_defaults
        assert loaded.tokenizer.chat_template.templates == several
        assert loaded.chat_prompt(messages, []).tolist() == list(ids)
        assert loaded.chat_prompt(messages, []).tolist() == (
            preprocessor.chat_prompt(messages, []).tolist()
        )


def test_all_of_it_comes_from_a_hub(tmp_path, monkeypatch):
    folder = tmp_path / "granite"
    (folder / "additional_chat_templates").mkdir(parents=True)
    tiny_granite.save(folder)
    (folder / "chat_template.jinja").write_text(templates.GRANITE)
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    hub = Hub({"user/granite": {name: files[name] for name in files if (folder / name).is_file()}})
    with serving(hub) as address:
        point_client_to(address, tmp_path / "cache", monkeypatch)
        found = keras_mamba2.Mamba2CausalLMPreprocessor.from_preset("hf://user/granite")
    assert found.generation_defaults == tiny_granite.GENERATION
    template = found.tokenizer.chat_template
    assert template.templates == {"default": templates.GRANITE, "rag": "{{ documents }}"}
    assert not [path for path in hub.downloads() if path.endswith(".safetensors")]


def test_settings_of_generation_are_checked(tmp_path):
    with pytest.raises(ValueError, match="must be a number. Received: temperature='hot'"):
        keras_mamba2.Mamba2CausalLMPreprocessor(
            keras_mamba2.Mamba2Tokenizer(
                tokenizer=tokenizers.Tokenizer.from_str(family_tokenizers.trained("granite")),
                end_token="<|end_of_text|>",
                start_token=None,
            ),
            generation_defaults={"temperature": "hot"},
        )
