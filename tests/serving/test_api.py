"""The API, by the client that its users have."""

import asyncio
import re
import threading
from typing import ClassVar

import fastapi
import httpx
import keras_hub
import numpy as np
import openai
import pytest
from keras import ops

import keras_mamba2
from keras_mamba2.serving import prompts
from keras_mamba2.serving.app import create_app
from keras_mamba2.serving.bodies import CompletionBodies
from keras_mamba2.serving.openai_types import ChatRequest
from keras_mamba2.serving.prompts import Prompts
from tests.serving.collected import Collected
from tests.serving.collected import wait_until
from tests.serving.conftest import NAME
from tests.serving.conftest import client_of
from tests.serving.conftest import serving

GREEDY = {"model": NAME, "temperature": 0, "max_tokens": 20}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def alone(lm, prompt, **options):
    options = {"temperature": 0.0, "max_new_tokens": 20, **options}
    return lm.generate(prompt, strip_prompt=True, **options)


def new_tokens(lm, prompt):
    _, [found] = lm.generate(prompt, max_new_tokens=20, temperature=0.0, return_logprobs=True)
    return found["token_ids"].tolist()


class TestCompletions:
    def test_the_text_is_what_generate_gives(self, client, lm):
        answer = client.completions.create(prompt="ROMEO:", **GREEDY)
        assert answer.choices[0].text == alone(lm, "ROMEO:")
        assert answer.choices[0].finish_reason == "length"
        assert answer.model == NAME
        assert answer.usage.prompt_tokens == 6
        assert answer.usage.completion_tokens == 20
        assert answer.usage.total_tokens == 26
        assert answer.usage.prompt_tokens_details.cached_tokens == 0

    def test_the_pieces_of_a_stream_are_the_text(self, client, lm):
        *chunks, last = client.completions.create(prompt="ROMEO:", **GREEDY, **USAGE)
        assert "".join(chunk.choices[0].text for chunk in chunks) == alone(lm, "ROMEO:")
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons == [*[None] * (len(chunks) - 1), "length"]
        assert last.choices == []
        assert last.usage.completion_tokens == 20
        assert len({chunk.id for chunk in chunks}) == 1

    def test_drawn_with_a_seed(self, client, lm):
        options = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
        expected = alone(lm, ["you", "hello"], num_return_sequences=2, **options)
        answer = client.completions.create(
            **{**GREEDY, **options}, prompt=["you", "hello"], n=2, extra_body={"top_k": 1000}
        )
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == 8
        assert answer.usage.completion_tokens == 80

    def test_the_same_prompt_twice_is_two_texts(self, client, lm):
        options = {"temperature": 1.0, "seed": 7}
        answer = client.completions.create(**{**GREEDY, **options}, prompt=["you", "you"])
        found = [choice.text for choice in answer.choices]
        assert found == alone(lm, ["you", "you"], **options)
        assert found[0] != found[1]
        assert answer.usage.prompt_tokens == 6

    @pytest.mark.parametrize(("times", "n"), [(6, 1), (1, 6), (3, 3)])
    def test_one_prompt_more_often_than_sequences_run_at_once(self, client, lm, times, n):
        """Four do. The texts are as many others as those of one call of `generate`."""
        options = {"temperature": 1.0, "seed": 7}
        answer = client.completions.create(**{**GREEDY, **options}, prompt=["you"] * times, n=n)
        found = [choice.text for choice in answer.choices]
        assert found == alone(lm, ["you"] * times, num_return_sequences=n, **options)
        assert len(set(found)) == times * n
        assert answer.usage.prompt_tokens == 3 * times

    def test_without_a_seed_it_is_another_each_time(self, client):
        options = {"model": NAME, "prompt": "you", "max_tokens": 20}
        texts = {client.completions.create(**options).choices[0].text for _ in range(3)}
        assert len(texts) == 3

    def test_token_ids_are_prompts_too(self, client, lm):
        ids = list(b"ROMEO:")
        [choice] = client.completions.create(prompt=ids, **GREEDY).choices
        assert choice.text == alone(lm, "ROMEO:")
        several = client.completions.create(prompt=[ids, list(b"you")], **GREEDY).choices
        assert [choice.text for choice in several] == alone(lm, ["ROMEO:", "you"])

    def test_stop_strings(self, client, lm):
        text = alone(lm, "ROMEO:")
        stop = next(text[i : i + 2] for i in range(4, 19) if text[i : i + 2].isascii())
        expected = text[: text.index(stop)]
        options = {**GREEDY, "prompt": "ROMEO:", "stop": [stop, "never"]}
        answer = client.completions.create(**options)
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "stop"
        # Up to the token that completes it, however many came at once.
        tokens = bytes(new_tokens(lm, "ROMEO:"))
        assert answer.usage.completion_tokens == tokens.index(stop.encode()) + 2
        *chunks, last = client.completions.create(**options, **USAGE)
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert last.usage == answer.usage

    def test_echo(self, client, lm):
        options = {**GREEDY, "prompt": ["ROMEO:", list(b"you")], "echo": True}
        options["prompt"] = "ROMEO:"
        answer = client.completions.create(**options)
        assert answer.choices[0].text == "ROMEO:" + alone(lm, "ROMEO:")
        chunks = client.completions.create(**options, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text

    def test_log_probabilities(self, client, lm):
        _, [expected] = lm.generate(
            "ROMEO:", max_new_tokens=20, temperature=0.0, return_logprobs=True
        )
        answer = client.completions.create(prompt="ROMEO:", **GREEDY, logprobs=3)
        found = answer.choices[0].logprobs
        assert found.token_logprobs == pytest.approx(expected["logprobs"].tolist(), abs=1e-4)
        assert len(found.tokens) == len(found.top_logprobs) == len(found.text_offset) == 20
        for logprob, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
            # Bytes that are no character have one and the same text.
            assert 1 <= len(top) <= 3
            assert max(top.values()) == pytest.approx(logprob, abs=1e-6)
        *chunks, _ = client.completions.create(prompt="ROMEO:", **GREEDY, **USAGE, logprobs=3)
        streamed = [
            t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens
        ]
        assert streamed == found.tokens

    def test_tokens_keep_their_blanks(self, client, lm, monkeypatch):
        """Of a tokenizer that strips the one before a text."""
        tokenizer = lm.preprocessor.tokenizer
        plain = tokenizer.detokenize
        stripped = lambda ids: plain(ids).removeprefix(" ")  # noqa: E731
        monkeypatch.setattr(tokenizer, "detokenize", stripped)
        prompts = Prompts(lm, 100)
        assert prompts.token_text(ord(" ")) == " "
        assert prompts.token_text(ord("b")) == "b"

    def test_offsets_count_what_a_stop_string_holds_back(self, client, lm):
        """Until it is known whether it begins there."""
        text = alone(lm, "ROMEO:")
        begin = next(letter for letter in text[1:-2] if letter.isascii())
        options = {**GREEDY, "prompt": "ROMEO:", "logprobs": 0}
        free = client.completions.create(**options)
        held = client.completions.create(**options, stop=f"{begin}, which never comes")
        assert held.choices[0].text == free.choices[0].text
        assert held.choices[0].logprobs.text_offset == free.choices[0].logprobs.text_offset

    def test_what_asks_for_nothing_passes(self, client, lm):
        answer = client.completions.create(
            **GREEDY,
            prompt="ROMEO:",
            best_of=1,
            frequency_penalty=0,
            logit_bias={},
            presence_penalty=0.0,
            suffix="",
            user="me",
            n=1,
            stop=None,
            extra_body={"prompt_cache_key": "s1", "safety_identifier": "u1", "unknown": None},
        )
        assert answer.choices[0].text == alone(lm, "ROMEO:")

    def test_top_p_0_is_the_likeliest(self, client, lm):
        options = {**GREEDY, "temperature": 1.0, "top_p": 0}
        answer = client.completions.create(prompt="ROMEO:", **options)
        assert answer.choices[0].text == alone(lm, "ROMEO:")


def score(lm, token_ids):
    """The log probabilities of all tokens `(n v)`, and of its own after the first."""
    ids = np.array([token_ids])
    logits = ops.cast(lm.score(ids), "float32")[0, :-1]
    losses = lm.score(ids[:, :-1], scoring_mode="loss", target_ids=ids[:, 1:])[0]
    return ops.convert_to_numpy(ops.log_softmax(logits)), -ops.convert_to_numpy(losses)


class TestScores:
    """`echo` with `logprobs`: the log probabilities of the prompt."""

    PROMPT = (
        "Now is the winter of our discontent, made glorious summer by this sun of York. \u00e9!"
    )
    OPTIONS: ClassVar = {"model": NAME, "echo": True, "logprobs": 2, "temperature": 0}

    @pytest.mark.parametrize("as_ids", [False, True])
    def test_they_are_those_of_score(self, client, lm, as_ids):
        ids = list(self.PROMPT.encode())
        every, expected = score(lm, ids)
        prompt = ids if as_ids else self.PROMPT
        answer = client.completions.create(prompt=prompt, max_tokens=0, **self.OPTIONS)
        [choice] = answer.choices
        assert choice.text == self.PROMPT
        assert choice.finish_reason == "length"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(ids)
        found = choice.logprobs
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        np.testing.assert_allclose(found.token_logprobs[1:], expected, atol=1e-4)
        best = [max(top.values()) for top in found.top_logprobs[1:]]
        np.testing.assert_allclose(best, every.max(axis=1), atol=1e-4)
        # Exactly, by which lm-evaluation-harness tells whether a token is the likeliest.
        likeliest = [
            logprob == top for logprob, top in zip(found.token_logprobs[1:], best, strict=True)
        ]
        assert likeliest == (every.argmax(axis=1) == ids[1:]).tolist()
        starts = [len(bytes(ids[:i]).decode(errors="ignore")) for i in range(len(ids))]
        assert found.text_offset == starts
        assert found.tokens[:3] == ["N", "o", "w"]

    def test_new_tokens_come_after_them(self, client, lm):
        """Whatever is known of the prompt, all of it is scored; nothing else changes."""
        options = {"prompt": self.PROMPT, "max_tokens": 20}
        plain = client.completions.create(**{**self.OPTIONS, **options, "echo": False})
        answer = client.completions.create(**self.OPTIONS, **options)
        n = answer.usage.prompt_tokens
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        assert answer.choices[0].text == self.PROMPT + plain.choices[0].text
        found, new = answer.choices[0].logprobs, plain.choices[0].logprobs
        assert found.tokens[n:] == new.tokens
        assert found.token_logprobs[n:] == pytest.approx(new.token_logprobs, abs=1e-4)
        assert found.text_offset[n:] == [len(self.PROMPT) + offset for offset in new.text_offset]
        *chunks, last = client.completions.create(**self.OPTIONS, **options, **USAGE)
        assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
        parts = [chunk.choices[0].logprobs for chunk in chunks]
        streamed = [logprob for part in parts if part for logprob in part.token_logprobs]
        assert streamed[1:] == pytest.approx(found.token_logprobs[1:], abs=1e-4)
        assert last.usage == answer.usage

    def test_several_prompts_as_lm_evaluation_harness_asks(self, client, lm):
        """Of ids, one more token than is wanted, and the sum over a continuation."""
        prompts = [list(b"ROMEO: you"), list(b"hello, " * 40), [7], list(b"ROMEO: you")]
        options = {**self.OPTIONS, "logprobs": 1, "max_tokens": 1, "seed": 1234}
        answer = client.completions.create(prompt=prompts, **options)
        for ids, choice in zip(prompts, answer.choices, strict=True):
            found = choice.logprobs.token_logprobs
            assert len(found) == len(ids) + 1
            if len(ids) > 1:
                np.testing.assert_allclose(found[1:-1], score(lm, ids)[1], atol=1e-4)

    def test_an_end_is_told_too(self, client, lm, monkeypatch):
        """Else the harness, which leaves the last one out, would miss a token of the prompt."""
        ids = list(b"hello, you")
        [end, *_] = new_tokens(lm, "hello, you")
        monkeypatch.setattr(lm.preprocessor.tokenizer, "end_token_id", end)
        options = {**self.OPTIONS, "logprobs": 1, "max_tokens": 1}
        [choice] = client.completions.create(prompt=ids, **options).choices
        assert (choice.text, choice.finish_reason) == ("hello, you", "stop")
        np.testing.assert_allclose(
            choice.logprobs.token_logprobs[1:-1], score(lm, ids)[1], atol=1e-4
        )

    def test_an_echo_alone_needs_no_new_token(self, client):
        options = {"model": NAME, "prompt": "ROMEO:", "echo": True, "max_tokens": 0}
        answer = client.completions.create(**options, n=2)
        assert [(c.text, c.logprobs) for c in answer.choices] == [("ROMEO:", None)] * 2
        assert answer.usage.completion_tokens == 0

    def test_choices_share_those_of_their_prompt(self, client, monkeypatch):
        asked, offsets = [], Prompts.offsets
        monkeypatch.setattr(
            Prompts, "offsets", lambda self, prompt: asked.append(prompt) or offsets(self, prompt)
        )
        answer = client.completions.create(prompt="ROMEO:", n=4, max_tokens=0, **self.OPTIONS)
        assert len({str(choice.logprobs) for choice in answer.choices}) == 1
        assert len(answer.choices) == 4
        assert len(asked) == 1

    def test_more_than_an_answer_should_have_are_refused(self, client, monkeypatch):
        monkeypatch.setattr(prompts, "MOST_TOLD", 23)
        options = {**self.OPTIONS, "prompt": ["ROMEO:", "JULIET"], "max_tokens": 0}
        with pytest.raises(openai.BadRequestError, match="23 tokens of prompts. Received: 24"):
            client.completions.create(n=2, **options)
        assert len(client.completions.create(n=1, **options).choices) == 2
        client.completions.create(n=2, **{**options, "logprobs": None})

    def test_many_do_not_stop_others(self, client, monkeypatch):
        """The answer is written beside the loop of events, which has other streams."""
        threads, whole = [], CompletionBodies.whole

        def writing(self, *args):
            threads.append(threading.current_thread())
            return whole(self, *args)

        monkeypatch.setattr(CompletionBodies, "whole", writing)
        client.completions.create(prompt="x" * 90, max_tokens=1, **self.OPTIONS)
        [thread] = threads
        assert "worker" in thread.name.lower()

    def test_of_nothing_they_are_empty(self, client, lm, monkeypatch):
        """Not absent: who asked for them looks into each choice."""
        [end, *_] = new_tokens(lm, "hello, you")
        monkeypatch.setattr(lm.preprocessor.tokenizer, "end_token_id", end)
        options = {"model": NAME, "prompt": "hello, you", "temperature": 0, "max_tokens": 5}
        [choice] = client.completions.create(logprobs=1, **options).choices
        assert (choice.text, choice.logprobs.tokens) == ("", [])
        [choice] = client.completions.create(**options).choices
        assert choice.logprobs is None

    def test_no_state_is_kept_for_them(self, client, engine):
        known = len(engine.prefix_cache)
        client.completions.create(prompt="x" * 90, max_tokens=1, **self.OPTIONS)
        assert len(engine.prefix_cache) == known


class TestPrefixes:
    def test_a_known_beginning_is_not_read_again(self, client, lm):
        system = "You are an actor on the stage of the Globe. " * 5
        before = alone(lm, system + "first")
        first = client.completions.create(prompt=system + "first", **GREEDY)
        client.completions.create(prompt=system + "second", **GREEDY)
        third = client.completions.create(prompt=system + "third", **GREEDY)
        # Where the first two part, a state is kept.
        assert third.usage.prompt_tokens_details.cached_tokens == len(system)
        assert third.choices[0].text == alone(lm, system + "third")
        again = client.completions.create(prompt=system + "first", **GREEDY)
        assert again.usage.prompt_tokens_details.cached_tokens == len(system + "first") - 1
        assert again.choices[0].text == first.choices[0].text == before

    def test_each_of_several_texts_goes_on_from_its_end(self, engine):
        """Though all end in one run, and who receives an end goes at once."""
        texts = [f"{i} texts that end, and are long enough to be remembered" for i in range(3)]

        def leave(asked):
            return lambda delivery: delivery.finish_reason and engine.cancel(asked[0].request)

        asked = []
        for text in texts:
            mine = []
            mine.append(Collected(text, limit=9, on_delivery=leave(mine)).submit(engine))
            asked += mine
        for text, each in zip(texts, asked, strict=True):
            read = [*text.encode(), *each.tokens()[:-1]]
            again = Collected([*read, 0], limit=1).submit(engine).wait()
            assert again.request.cached_tokens == len(read)

    def test_a_text_goes_on_from_its_end(self, client, lm):
        prompt = "Now is the winter of our discontent"
        client.completions.create(prompt=prompt, **GREEDY)
        longer = [*prompt.encode(), *new_tokens(lm, prompt)]
        more = client.completions.create(prompt=longer, **GREEDY)
        assert more.usage.prompt_tokens_details.cached_tokens == len(longer) - 1


class TestModels:
    def test_models(self, client):
        assert [model.id for model in client.models.list()] == [NAME]
        assert client.models.retrieve(NAME).owned_by == "keras_mamba2"
        with pytest.raises(openai.NotFoundError, match="does not exist here"):
            client.models.retrieve("other")

    def test_embeddings_are_refused_with_the_reason(self, client):
        with pytest.raises(openai.NotFoundError, match="has no embeddings") as error:
            client.embeddings.create(model=NAME, input="text")
        assert error.value.code == "not_supported"

    def test_state_of_the_server(self, address, client):
        client.completions.create(prompt="ROMEO:", **GREEDY)
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        assert httpx.get(f"{address}/ready").json() == {"status": "ready"}
        text = httpx.get(f"{address}/metrics").text
        values = dict(re.findall(r"^(keras_mamba2_\S+) (\S+)$", text, re.MULTILINE))
        assert float(values["keras_mamba2_new_tokens_total"]) >= 20
        assert float(values["keras_mamba2_first_token_seconds_count"]) >= 1
        path = 'path="/v1/completions",status="200"'
        assert float(values[f"keras_mamba2_requests_total{{{path}}}"]) >= 1

    def test_many_clients_at_once(self, address, lm):
        """Streamed and whole, drawn and greedy: each gets what it gets alone."""
        prompts = [f"{i} ROMEO:" for i in range(12)]

        async def ask(client, i):
            options = {"temperature": 0.9 * (i % 3 > 0), "seed": i, "model": NAME}
            options |= {"prompt": prompts[i], "max_tokens": 10 + i}
            if i % 2:
                return (await client.completions.create(**options)).choices[0].text
            chunks = await client.completions.create(**options, stream=True)
            return "".join([chunk.choices[0].text async for chunk in chunks])

        async def ask_all():
            async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
                return await asyncio.gather(*[ask(client, i) for i in range(12)])

        for i, text in enumerate(asyncio.run(ask_all())):
            options = {"temperature": 0.9 * (i % 3 > 0), "seed": i, "max_new_tokens": 10 + i}
            assert text == alone(lm, prompts[i], **options)


class TestChat:
    def test_a_model_without_a_template_says_so(self, client):
        with pytest.raises(openai.BadRequestError, match="has no chat template") as error:
            client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "hello"}]
            )
        assert error.value.code == "no_chat_template"


SYSTEM = {"role": "system", "content": "You are an actor on the stage of the Globe."}
HELLO = [SYSTEM, {"role": "user", "content": "hello"}]


@pytest.mark.usefixtures("template")
class TestConversations:
    def test_the_reply_is_that_of_chat(self, client, lm):
        answer = client.chat.completions.create(messages=HELLO, **GREEDY)
        expected = lm.chat(HELLO, max_new_tokens=20, temperature=0.0)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage.prompt_tokens == len(lm.preprocessor.chat_prompt(HELLO))

    def test_streamed(self, client, lm):
        *chunks, last = client.chat.completions.create(messages=HELLO, **GREEDY, **USAGE)
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content for chunk in chunks)
        assert text == lm.chat(HELLO, max_new_tokens=20, temperature=0.0)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert last.usage.completion_tokens == 20

    def test_drawn_several_times(self, client, lm):
        options = {**GREEDY, "temperature": 0.8, "seed": 3, "n": 2}
        answer = client.chat.completions.create(messages=HELLO, **options)
        first, second = (choice.message.content for choice in answer.choices)
        assert first == lm.chat(HELLO, max_new_tokens=20, temperature=0.8, seed=3)
        assert second != first

    def test_drawn_as_the_model_was_compiled(self, client, lm, monkeypatch):
        for name, value in {"temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.2}.items():
            monkeypatch.setattr(lm.sampler, name, value)
        options = {"model": NAME, "max_tokens": 20, "seed": 3}
        answer = client.chat.completions.create(messages=HELLO, **options)
        expected = lm.chat(HELLO, max_new_tokens=20, seed=3)
        assert answer.choices[0].message.content == expected
        assert expected != lm.chat(HELLO, max_new_tokens=20, seed=3, temperature=1.0)

    @pytest.mark.parametrize(
        ("sampler", "given", "expected"),
        [
            ("greedy", {}, {"temperature": 0.0}),
            ("greedy", {"temperature": 0.5}, {"temperature": 0.5}),
            ("random", {}, {"temperature": 1.0}),
            (
                keras_hub.samplers.TopPSampler(p=0.5, temperature=0.25),
                {"top_k": 7, "min_p": 0.125},
                {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125},
            ),
            (keras_mamba2.FilterSampler(min_p=0.25), {"top_k": 3}, {"min_p": 0.25, "top_k": 3}),
            # Without a sampler of its own, as the checkpoint says.
            ("auto", {}, {"temperature": 0.0}),
        ],
    )
    def test_what_is_not_given_is_of_the_sampler(self, lm, sampler, given, expected):
        other = keras_mamba2.Mamba2CausalLM(lm.backbone, lm.preprocessor)
        other.compile(sampler=sampler)
        body = ChatRequest(model=NAME, messages=HELLO, **given)
        found = Prompts(other, 4096).of_chat(body).parameters
        assert {name: found[name] for name in expected} == expected

    def test_a_sampler_that_rows_cannot_have_is_refused_at_the_start(self, lm):
        other = keras_mamba2.Mamba2CausalLM(lm.backbone, lm.preprocessor)
        other.compile(sampler="beam")
        with pytest.raises(ValueError, match="BeamSampler does not take .*FilterSampler"):
            Prompts(other, 4096)

    def test_parts_and_developers(self, client):
        parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        messages = [{**SYSTEM, "role": "developer"}, {"role": "user", "content": parts}]
        answers = [
            client.chat.completions.create(messages=m, **GREEDY).choices[0].message.content
            for m in (HELLO, messages)
        ]
        assert answers[0] == answers[1]

    def test_other_conversations_share_the_system_message(self, client):
        system = {"role": "system", "content": "You are a clown on the stage of the Globe."}
        for what in ("to be", "not to be"):
            messages = [system, {"role": "user", "content": what}]
            answer = client.chat.completions.create(messages=messages, **GREEDY)
        assert answer.usage.prompt_tokens_details.cached_tokens > len(system["content"])

    def test_log_probabilities(self, client):
        answer = client.chat.completions.create(
            messages=HELLO, **GREEDY, logprobs=True, top_logprobs=2
        )
        content = answer.choices[0].logprobs.content
        assert len(content) == 20
        for token in content:
            assert len(token.top_logprobs) == 2
            assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-6)
            assert token.bytes is None or bytes(token.bytes).decode() == token.token

    def test_as_long_as_there_is_room(self, client):
        """Without `max_tokens`, what the checkpoint says or 1024, where that fits."""
        with client.with_options(timeout=60).chat.completions.create(
            model=NAME, messages=HELLO, stream=True
        ) as chunks:
            assert next(iter(chunks)).choices[0].delta.role == "assistant"


class TestKeys:
    def test_only_who_has_one_is_served(self, keyed_address):
        for key in ("wrong", "secre", "secret2"):
            with client_of(keyed_address, api_key=key) as client:
                with pytest.raises(openai.AuthenticationError) as error:
                    client.completions.create(prompt="ROMEO:", **GREEDY)
                assert error.value.code == "invalid_api_key"
        for headers in ({}, {"Authorization": b"Bearer \xfc\xff"}, {"Authorization": "Basic c2"}):
            assert httpx.get(f"{keyed_address}/v1/models", headers=headers).status_code == 401
        for key in ("secret", "other"):
            with client_of(keyed_address, api_key=key) as client:
                assert client.completions.create(prompt="ROMEO:", **GREEDY).choices
        assert httpx.get(f"{keyed_address}/health").status_code == 200

    def test_in_another_application_too(self, engine):
        main = fastapi.FastAPI()
        main.mount("/llm", create_app(engine, NAME, api_keys=["secret"]))
        with serving(main) as address:
            answers = [
                httpx.get(f"{address}/llm/v1/models", headers=headers).status_code
                for headers in ({}, {"Authorization": "Bearer secret"})
            ]
        assert answers == [401, 200]

    @pytest.mark.parametrize("keys", [[""], ["secret", " "], "secret"])
    def test_one_that_everybody_has_is_refused(self, engine, keys):
        with pytest.raises(ValueError, match="API keys must be a list of strings that are not bla"):
            create_app(engine, NAME, api_keys=keys)


class TestGone:
    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_goes_frees_its_place(self, address, engine, stream):
        async def go():
            async with httpx.AsyncClient(timeout=60) as client:
                body = {**GREEDY, "prompt": "ROMEO:", "max_tokens": 4000, "stream": stream}
                asking = asyncio.ensure_future(client.post(f"{address}/v1/completions", json=body))
                await asyncio.to_thread(wait_until, lambda: engine.num_running, 1e-4)
                asking.cancel()
                await asyncio.wait([asking])

        cancelled = engine.counts.cancelled
        asyncio.run(go())
        wait_until(lambda: engine.num_running == 0)
        assert engine.counts.cancelled == cancelled + 1  # counted before the place is free
