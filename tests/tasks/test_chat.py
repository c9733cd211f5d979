"""A turn costs what is new in it, and gives what the whole conversation gives."""

import json

import keras
import keras_hub
import numpy as np
import pytest
import torch
import transformers
from keras import ops

import keras_mamba2
from keras_mamba2.models.mamba2_tokenizer import byte_vocabulary
from keras_mamba2.state import files
from keras_mamba2.tasks.chat_options import RESERVED
from keras_mamba2.tasks.chat_options import ChatOptions
from keras_mamba2.tasks.mamba2_chat import KEPT_STATES
from tests.chat import templates
from tests.chat.test_tools import weather
from tests.tasks import tiny_granite

HELLO = {"role": "user", "content": "Hello, who are you?"}
QUESTIONS = ("Hello?", "And now, what?", "12345 日本語", "The end.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_granite.save(tmp_path_factory.mktemp("granite"))


@pytest.fixture(scope="module")
def granite(folder):
    return keras_mamba2.Mamba2CausalLM.from_preset(folder)


class LetterSampler(keras_hub.samplers.RandomSampler):
    """Draws letters, of which every text is made again of the same tokens; now and then the end."""

    def get_next_token(self, probabilities):
        ids = np.arange(257)
        allowed = np.isin(ids, list(range(97, 123))) | (ids == 256)
        return super().get_next_token(ops.where(allowed, probabilities, 1e-30))


def byte_lm(arguments, template):
    tokenizer = keras_mamba2.Mamba2Tokenizer(
        byte_vocabulary("<|endoftext|>"), [], chat_template=template
    )
    keras.utils.set_random_seed(0)
    lm = keras_mamba2.Mamba2CausalLM(
        keras_mamba2.Mamba2Backbone(**arguments),
        keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer),
    )
    lm.compile(sampler=LetterSampler())
    return lm


# Only appends; the reply ends with the end token.
PLAIN = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% else %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture(scope="module")
def letters(small_backbone_arguments):
    return byte_lm(small_backbone_arguments, PLAIN)


@pytest.fixture
def fed(letters, monkeypatch):
    """How many tokens the model has read in each call of its prefill."""
    generator, counts = letters.make_generate_function(), []
    prefill = generator.prefill

    def counting(prompts, state=None):
        counts.append(sum(map(len, prompts)))
        return prefill(prompts, state)

    monkeypatch.setattr(generator, "prefill", counting)
    return counts


def whole(lm, chat, **options):
    """The reply to a conversation all of which is read anew."""
    return lm.chat(chat.messages[:-1], chat.tools, **options)


def test_a_reply_is_that_of_transformers(granite, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for messages, tools in (([HELLO], None), ([HELLO], [weather])):
        inputs = tokenizer.apply_chat_template(
            messages, tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        expected = tokenizer.decode(new, skip_special_tokens=True)
        assert granite.chat(messages, tools, max_new_tokens=24) == expected
        pieces = list(granite.stream_chat(messages, tools, max_new_tokens=24))
        assert len(pieces) > 1
        assert "".join(pieces) == expected


@pytest.mark.parametrize("name", ["granite", "nemotron", "chatml", "llama"])
def test_every_turn_is_that_of_the_whole_conversation(granite, name, monkeypatch):
    """Though random tokens are seldom those that their text is made of, and end anywhere."""
    template = keras_mamba2.ChatTemplate(templates.ALL[name], {"bos_token": "<|end_of_text|>"})
    monkeypatch.setattr(granite.preprocessor.tokenizer, "chat_template", template)
    chat = granite.start_chat(system="Be brief.", max_new_tokens=9)
    for question in QUESTIONS:
        reply = chat.send(question)
        assert chat.messages[-1] == {"role": "assistant", "content": reply}
        assert reply == whole(granite, chat, max_new_tokens=9)
    assert chat.usage.cached_tokens > 0


def test_a_turn_costs_what_is_new_in_it(letters, fed):
    chat = letters.start_chat(system="x" * 100, max_new_tokens=30)
    seen = 0
    for question in QUESTIONS:
        del fed[:]
        chat.send(question, seed=1)
        usage = chat.usage
        assert usage.cached_tokens == seen
        # The prompt but for what is known, and nothing twice.
        assert sum(fed) == usage.prompt_tokens - seen
        seen = usage.prompt_tokens + usage.new_tokens
    new = f"<|endoftext|>u: {QUESTIONS[-1]};a: ".replace("<|endoftext|>", "e")
    assert sum(fed) <= len(new.encode())


def test_where_the_past_is_edited_it_is_read_again(small_backbone_arguments):
    """From the last turn that is still the same: what comes behind it was another text."""
    lm = byte_lm(small_backbone_arguments, templates.NEMOTRON)
    chat = lm.start_chat(system="Think.", max_new_tokens=20)
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\nYes."}
    write = lm.preprocessor.chat_prompt
    chat.send("One?", seed=1)
    chat = lm.start_chat(messages=[*chat.messages[:-1], thought], max_new_tokens=20)
    chat.send("Two?", seed=2)
    before = write(chat.messages[:-1], add_generation_prompt=False)
    assert b"<think></think>Yes." in bytes(before[before < 256].tolist())
    chat.send("Three?", seed=3)
    # The reply to "Two?" began with a thought, which the template has dropped since.
    assert chat.usage.cached_tokens == len(before)
    assert chat.messages[-1]["content"] == whole(lm, chat, seed=3, max_new_tokens=20)


def test_random_numbers_and_penalties_know_the_whole_conversation(granite):
    options = {"temperature": 0.5, "repetition_penalty": 3.0, "seed": 3, "max_new_tokens": 12}
    chat = granite.start_chat(**options)
    replies = [chat.send(question) for question in QUESTIONS[:2]]
    assert replies[1] == whole(granite, chat, **options)
    assert replies[1] != whole(granite, chat, **{**options, "repetition_penalty": 1.0})


class TestStates:
    def test_undo_goes_back_without_reading(self, letters, fed):
        chat = letters.start_chat(max_new_tokens=10, seed=0)
        first = chat.send("One")
        second = chat.send("Two")
        del fed[:]
        taken = chat.undo()
        assert [message["content"] for message in taken] == ["Two", second]
        assert [message["content"] for message in chat.messages] == ["One", first]
        assert chat.send("Two") == second
        assert sum(fed) == len("a: ")
        chat.undo()
        chat.undo()
        with pytest.raises(ValueError, match="no turn to take back"):
            chat.undo()

    def test_forks_are_independent(self, letters, fed):
        chat = letters.start_chat(system="x" * 50, max_new_tokens=10, seed=0)
        chat.send("One")
        other = chat.fork()
        del fed[:]
        left, right = chat.send("Two"), other.send("Three")
        assert sum(fed) < 50
        assert left != right
        assert (chat.messages[-2]["content"], other.messages[-2]["content"]) == ("Two", "Three")
        assert right == whole(letters, other, max_new_tokens=10, seed=0)

    def test_a_file_resumes_it(self, letters, fed, tmp_path):
        chat = letters.start_chat(tools=[weather], max_new_tokens=10, seed=0)
        with pytest.raises(ValueError, match="nothing to save yet"):
            chat.save(tmp_path / "chat")
        chat.send("One")
        chat.send("x" * 30)
        chat.undo()
        chat.save(tmp_path / "chat")
        resumed = letters.resume_chat(tmp_path / "chat", max_new_tokens=10, seed=0)
        assert (resumed.messages, resumed.tools) == (chat.messages, chat.tools)
        del fed[:]
        reply = resumed.send("Two")
        assert sum(fed) < 20
        assert reply == chat.send("Two")
        unread = letters.start_chat(messages=chat.messages, max_new_tokens=10, seed=0)
        unread.save(tmp_path / "unread")
        resumed = letters.resume_chat(tmp_path / "unread", max_new_tokens=10, seed=0)
        assert resumed.send("So?") == whole(letters, resumed, max_new_tokens=10, seed=0)
        letters.start("Once").save(tmp_path / "text")
        with pytest.raises(ValueError, match="text holds a text, not a conversation. `lm.resume`"):
            letters.resume_chat(tmp_path / "text")
        with pytest.raises(ValueError, match="missing"):
            letters.resume_chat(tmp_path / "none")
        with pytest.raises(ValueError, match="chat holds a conversation, not a text. `lm.resume_c"):
            letters.resume(tmp_path / "chat")

    @pytest.mark.parametrize(
        "changes",
        [
            {"messages": None},
            {"messages": 3},
            {"messages": ["a"]},
            {"messages": []},
            {"tools": 5},
            {"token_ids": None},
            {"token_ids": [2**40]},
            {"token_ids": ["a"]},
            {"token_ids": [[1, 2]]},
            {"token_ids": [1, 2, 3]},
        ],
        ids=str,
    )
    def test_a_file_that_says_something_else_is_named(self, letters, tmp_path, changes):
        chat = letters.start_chat(max_new_tokens=2, seed=0)
        chat.send("One")
        chat.save(tmp_path / "chat")
        *parts, text = files.load(tmp_path / "chat", letters.backbone)
        stored = {**json.loads(text), **changes}
        state = keras_mamba2.Mamba2State(*parts)
        state.save(tmp_path / "other", letters.backbone, json.dumps(stored))
        with pytest.raises(ValueError, match="other holds no whole conversation"):
            letters.resume_chat(tmp_path / "other")

    def test_their_number_is_bounded(self, letters):
        chat = letters.start_chat(max_new_tokens=2, seed=0)
        for i in range(KEPT_STATES):
            chat.send(str(i))
        assert len(chat._known._known) == KEPT_STATES
        for _ in range(KEPT_STATES - 1):
            chat.undo()
        reply = chat.send("1")  # whose state is gone
        assert reply == whole(letters, chat, max_new_tokens=2, seed=0)


class TestReplies:
    @pytest.mark.parametrize("how", ["left", "stopped", "interrupted"])
    def test_what_was_given_is_what_is_remembered(self, letters, how, monkeypatch):
        options = {"seed": 4, "max_new_tokens": 40}
        free = letters.chat([HELLO], **options)
        chat = letters.start_chat(**options)
        if how == "stopped":
            reply = chat.send(HELLO, stop_strings=free[7:9])
            assert free.startswith(reply)
        else:
            pieces, reply = chat.stream(HELLO), ""
            for _ in range(3):
                reply += next(pieces)
            if how == "left":
                pieces.close()
            else:
                with pytest.raises(KeyboardInterrupt):
                    pieces.throw(KeyboardInterrupt)
        assert chat.messages == [HELLO, {"role": "assistant", "content": reply}]
        assert 0 < len(reply) < len(free)
        chat.send("So?")
        assert chat.messages[-1]["content"] == whole(letters, chat, **options)

    def test_a_reply_ends_where_the_next_turn_begins(self, letters):
        chat = letters.start_chat(seed=4, max_new_tokens=40)
        pieces = chat.stream(HELLO)
        reply = next(pieces) + next(pieces)
        chat.send("So?")
        said = [HELLO, {"role": "assistant", "content": reply}, {"role": "user", "content": "So?"}]
        assert chat.messages[:-1] == said
        pieces = chat.stream("More?")
        next(pieces)
        assert [message["role"] for message in chat.undo()] == ["user", "assistant"]
        assert list(pieces) == []
        assert chat.messages[:-1] == said

    def test_a_reply_that_stops_at_once_is_a_reply(self, letters):
        chat = letters.start_chat(seed=4, max_new_tokens=40)
        first = letters.chat([HELLO], seed=4, max_new_tokens=40)[0]
        assert chat.send(HELLO, stop_strings=first) == ""
        assert chat.messages == [HELLO, {"role": "assistant", "content": ""}]

    def test_messages_of_any_role_are_sent(self, letters):
        chat = letters.start_chat(max_new_tokens=3, seed=0)
        chat.send([HELLO, {"role": "tool", "content": "7"}])
        chat.send({"role": "tool", "content": "8"})
        roles = [message["role"] for message in chat.messages]
        assert roles == ["user", "tool", "assistant", "tool", "assistant"]
        chat.messages.clear()
        assert len(chat.messages) == 5

    def test_what_is_no_text_is_not_in_it(self, granite):
        """Random weights write roles and ends now and then; nobody reads them."""
        engine = granite.preprocessor.tokenizer.engine
        ids = granite.preprocessor.tokenizer.control_token_ids
        control = [engine.id_to_token(id) for id in ids]
        assert "<|start_of_role|>" in control
        for seed in range(3):
            reply = granite.chat([HELLO], stop_token_ids=None, seed=seed, temperature=3.0,
                                 max_new_tokens=64)  # fmt: skip
            assert not any(token in reply for token in control)


class TestDefaults:
    def options(self, lm, monkeypatch, defaults, **given):
        monkeypatch.setattr(lm.preprocessor, "generation_defaults", defaults)
        return ChatOptions.checked(lm, **given).generation

    def test_stop_tokens_are_those_of_the_checkpoint(self, granite, monkeypatch):
        assert ChatOptions.checked(granite).generation.stop_token_ids == (0, 1)
        for named, expected in ((2, (0, 2)), ([2, 9999], (0, 2)), (None, (0,))):
            defaults = {} if named is None else {"eos_token_id": named}
            options = self.options(granite, monkeypatch, defaults)
            assert options.stop_token_ids == expected
        options = self.options(granite, monkeypatch, {"eos_token_id": 2}, stop_token_ids=[7])
        assert options.stop_token_ids == (7,)

    @pytest.mark.parametrize(
        ("defaults", "given", "expected"),
        [
            ({}, {}, {"temperature": 0.0}),
            ({"temperature": 0.7, "top_p": 0.9}, {}, {"temperature": 0.0}),
            (
                {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
                {"temperature": 0.2},
                {"temperature": 0.2, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1},
            ),
            ({"do_sample": True, "top_k": 0}, {}, {"temperature": 1.0, "top_k": "all"}),
            ({}, {"top_p": 0.5}, {"temperature": 1.0, "top_k": "all", "top_p": 0.5}),
        ],
    )
    def test_sampling_is_that_of_the_checkpoint(
        self, granite, monkeypatch, defaults, given, expected
    ):
        parameters = self.options(granite, monkeypatch, defaults, **given).parameters
        if expected.get("top_k") == "all":
            expected["top_k"] = granite.backbone.vocabulary_size
        assert {name: parameters[name] for name in expected} == expected

    def test_a_sampler_that_was_compiled_with_comes_before_the_checkpoint(self, letters):
        defaults = letters.preprocessor.generation_defaults
        assert not defaults
        assert ChatOptions.checked(letters).generation.parameters == {}
        other = keras_mamba2.Mamba2CausalLM(letters.backbone, letters.preprocessor)
        other.compile(optimizer="sgd")
        assert ChatOptions.checked(other).generation.parameters["temperature"] == 0
        other.compile(sampler="random")
        assert ChatOptions.checked(other, top_p=0.5).generation.parameters == {"top_p": 0.5}

    def test_a_checkpoint_may_say_how_long_replies_are(self, granite, monkeypatch):
        assert self.options(granite, monkeypatch, {}).max_new_tokens == 1024
        options = self.options(granite, monkeypatch, {"max_new_tokens": 7})
        assert options.max_new_tokens == 7


class TestErrors:
    """Before any token is made, and without a trace in the conversation."""

    @pytest.fixture(autouse=True)
    def no_work(self, letters, monkeypatch):
        def work(*args, **kwargs):
            raise AssertionError("tokens were read")

        monkeypatch.setattr(letters.make_generate_function(), "_feed", work)

    @pytest.mark.parametrize(
        ("messages", "options", "message"),
        [
            ([], {}, "conversation is empty"),
            ("Hello", {}, "must be a list of messages"),
            ([{"content": "a"}], {}, "Message 0 must be a dict with a `role`"),
            ([HELLO], {"max_context": 10}, "conversation has 26 tokens.*max_context=10"),
            ([HELLO], {"max_context": 26}, "no room for a reply"),
            ([HELLO], {"max_context": 0}, "max_context=0"),
            ([HELLO], {"max_new_tokens": 0}, "max_new_tokens=0"),
            ([HELLO], {"temperature": 1.0}, "LetterSampler does not take temperature"),
            ([HELLO], {"template_variables": 7}, "template_variables=7"),
            ([HELLO], {"template_variables": {5: 7}}, "must be strings.*Received: 5"),
            *(
                ([HELLO], {"template_variables": {name: 7}}, f"none of.*Received: '{name}'")
                for name in RESERVED
            ),
            ([HELLO | {"content": "\ud800"}], {}, "no UTF-8"),
        ],
    )
    def test_they_are_named(self, letters, messages, options, message):
        with pytest.raises(ValueError, match=message):
            letters.chat(messages, **options)
        with pytest.raises(ValueError, match=message):
            letters.stream_chat(messages, **options)
        if isinstance(messages, list):
            chat = letters.start_chat()
            with pytest.raises(ValueError, match=message):
                chat.stream(messages, **options)
            assert chat.messages == []

    def test_a_refused_role(self, letters, monkeypatch):
        template = keras_mamba2.ChatTemplate(templates.MISTRAL, {"bos_token": "", "eos_token": ""})
        monkeypatch.setattr(letters.preprocessor.tokenizer, "chat_template", template)
        chat = letters.start_chat(messages=[HELLO])
        with pytest.raises(ValueError, match="roles must alternate"):
            chat.send("Again")
        assert chat.messages == [HELLO]

    def test_models_that_do_not_answer(self, preset_folder, letters):
        lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
        for ask in (lm.chat, lm.stream_chat, lm.preprocessor.chat_prompt, lm.start_chat):
            with pytest.raises(ValueError, match="no chat template.*Use `generate`"):
                ask([HELLO] if ask != lm.start_chat else None)
        bare = keras_mamba2.Mamba2CausalLM(letters.backbone)
        with pytest.raises(ValueError, match="needs a `preprocessor`"):
            bare.start_chat()

    def test_unknown_options_are_errors_at_once(self, letters):
        with pytest.raises(TypeError, match="temprature"):
            letters.start_chat(temprature=1.0)


def test_a_conversation_ends_at_its_greatest_length(letters):
    reply = letters.chat([HELLO], max_context=30, seed=0)
    assert len(reply) <= 30 - len("u: Hello, who are you?;a: ")
