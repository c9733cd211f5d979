"""What clients may send by mistake or on purpose: the right status, an error, and on it goes."""

import asyncio
import json
import re
import socket
import threading
import time

import httpx
import openai
import pydantic
import pytest

from keras_mamba2 import ChatTemplate
from keras_mamba2.serving import server
from keras_mamba2.serving.answers import Answer
from keras_mamba2.serving.app import create_app
from keras_mamba2.serving.engine import Engine
from keras_mamba2.serving.limits import Limits
from keras_mamba2.serving.openai_types import CompletionRequest
from keras_mamba2.serving.slots import Slots
from tests.serving.collected import Collected
from tests.serving.collected import wait_until
from tests.serving.conftest import NAME
from tests.serving.conftest import client_of
from tests.serving.conftest import serving

GOOD = {"model": NAME, "prompt": "ROMEO:", "max_tokens": 5, "temperature": 0}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"

# What is sent beside `GOOD`, the parameter that is named, and a part of the message.
BAD = [
    ({"prompt": ""}, None, "no tokens"),
    ({"prompt": []}, "prompt", "at least 1"),
    ({"prompt": [""]}, None, "no tokens"),
    ({"prompt": [[]]}, "prompt", "at least 1"),
    ({"prompt": [257]}, None, "Token id 257"),
    ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
    ({"prompt": [2**40]}, "prompt", "less than"),
    ({"prompt": [1.5]}, "prompt", "integer"),
    ({"prompt": [True]}, "prompt", "integer"),
    ({"prompt": {"text": "hello"}}, "prompt", "string"),
    ({"prompt": "\ud800"}, "prompt", "unicode"),
    ({"prompt": ["hello"] * 33}, "prompt", "at most 32"),
    ({"prompt": "x" * 4100}, None, "maximum context length is 4096"),
    ({"model": 5}, "model", "string"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 100}, None, "25 requests of at most 4 sequences each, and 16 may wait"),
    ({"n": 1000}, "n", "less than or equal to 128"),
    ({"n": "2"}, "n", "integer"),
    ({"max_tokens": 0}, None, "unless `echo` asks for the prompt"),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"max_tokens": 5000}, None, "maximum context length is 4096"),
    ({"max_tokens": 10**30}, "max_tokens", "less than"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"stop": ""}, "stop", "at least 1"),
    ({"stop": [1]}, "stop", "string"),
    ({"stop": "x" * 1001}, "stop", "at most 1000"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"temperature": float("nan")}, "temperature", "finite"),
    ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"seed": "x"}, "seed", "integer"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, None, "stream: true"),
    ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
    ({"logit_bias": {"5": 1}}, None, "`logit_bias` is not supported"),
    ({"best_of": 2}, None, "`best_of` is not supported"),
    ({"best_of": True}, None, "`best_of` is not supported"),
    ({"frequency_penalty": 0.5}, None, "`frequency_penalty` is not supported"),
    ({"presence_penalty": -1}, None, "`presence_penalty` is not supported"),
    ({"suffix": "end"}, None, "`suffix` is not supported"),
    ({"nonsense": 1}, "nonsense", "Unrecognized request argument supplied: nonsense"),
    ({"top_k": 0}, "top_k", "greater than or equal to 1"),
    ({"repetition_penalty": 0.5}, "repetition_penalty", "greater than or equal to 1"),
]
BAD_CHATS = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hello"}, "messages", "list"),
    ({"messages": [{"content": "hello"}]}, None, "`role`"),
    ({"messages": [{"role": 5, "content": "hello"}]}, None, "`role`"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, None, "`content`"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "'image_url'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, None, "`text` of a part"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "UTF-8"),
    ({"tools": [{"type": "function"}]}, None, "`tools` is not supported"),
    ({"tool_choice": "required"}, None, "`tool_choice` is not supported"),
    ({"response_format": {"type": "json_object"}}, None, "`response_format` is not supported"),
    ({"top_logprobs": 2}, None, "need `logprobs: true`"),
    ({"logprobs": 2}, "logprobs", "boolean"),
    ({"chat_template_kwargs": 5}, "chat_template_kwargs", "dict"),
    ({"chat_template_kwargs": {"add_generation_prompt": False}}, None, "a conversation sets"),
    ({"chat_template_kwargs": {"messages": []}}, None, "Received: 'messages'"),
    ({"chat_template_kwargs": {"self": 1}}, None, "Received: 'self'"),
    ({"max_completion_tokens": 5000}, None, "maximum context length is 4096"),
]


@pytest.fixture
def web(address, engine):
    """A client, after whose requests the server still serves."""
    with httpx.Client(base_url=address, timeout=60) as web:
        yield web
        assert web.post(COMPLETIONS, json=GOOD).status_code == 200
    wait_until(lambda: engine.num_running + engine.num_waiting + engine.num_reading == 0)


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def post_json(web, path, body):
    """As `json=`, but with what is no JSON in spite of its name: NaN, half of a pair."""
    headers = {"Content-Type": "application/json"}
    return web.post(path, content=json.dumps(body), headers=headers)


class TestParameters:
    @pytest.mark.parametrize(("changes", "param", "message"), BAD)
    def test_of_completions(self, web, changes, param, message):
        error = error_of(post_json(web, COMPLETIONS, {**GOOD, **changes}), 400)
        assert message in error["message"]
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"

    @pytest.mark.usefixtures("template")
    @pytest.mark.parametrize(("changes", "param", "message"), BAD_CHATS)
    def test_of_chats(self, web, changes, param, message):
        error = error_of(post_json(web, CHATS, {**CHAT, **changes}), 400)
        assert message in error["message"]
        assert error["param"] == param

    @pytest.mark.parametrize("missing", ["model", "prompt"])
    def test_missing(self, web, missing):
        body = {name: value for name, value in GOOD.items() if name != missing}
        assert error_of(web.post(COMPLETIONS, json=body), 400)["param"] == missing

    def test_unknown_model(self, client):
        with pytest.raises(openai.NotFoundError, match="'other' does not exist") as error:
            client.completions.create(model="other", prompt="hello")
        assert error.value.code == "model_not_found"

    def test_a_template_that_refuses(self, web, lm, monkeypatch):
        refusing = ChatTemplate("{{ raise_exception('Roles must alternate') }}")
        monkeypatch.setattr(lm.preprocessor.tokenizer, "chat_template", refusing)
        assert "Roles must alternate" in error_of(web.post(CHATS, json=CHAT), 400)["message"]


class TestBodies:
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b'{"model": "small", "prompt": "he',
            b"\xff\xfe\x00",
            b'{"model": "small", "prompt": "\xff"}',
            b"[" * 100_000,
            b"[1, 2]",
            b"null",
            b'"text"',
            b'{"model": "small", "prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
        ],
    )
    def test_no_json(self, web, content):
        headers = {"Content-Type": "application/json"}
        error_of(web.post(COMPLETIONS, content=content, headers=headers), 400)

    def test_of_another_type(self, web):
        error_of(web.post(COMPLETIONS, content=b"prompt=hello"), 400)

    def test_too_large(self, web):
        """Said before it is read; and where its size is not told, as soon as it is too large."""
        body = {**GOOD, "prompt": "x" * 9_000_000}
        assert "8388608 bytes" in error_of(web.post(COMPLETIONS, json=body), 413)["message"]

    def test_a_hundred_megabytes_in_pieces(self, web):

        def pieces():
            yield b'{"prompt": "'
            for _ in range(100):
                yield b"x" * 2**20

        headers = {"Content-Type": "application/json"}
        error_of(web.post(COMPLETIONS, content=pieces(), headers=headers), 413)


class TestPaths:
    def test_unknown(self, web):
        assert error_of(web.get("/v1/nothing"), 404)["type"] == "invalid_request_error"

    def test_other_methods(self, web):
        response = web.get(COMPLETIONS)
        assert response.headers["Allow"] == "POST"
        error_of(response, 405)


class TestLimits:
    def test_a_full_queue(self, address, engine, web):
        """429 says when to come again; the client does so by itself."""
        running = [Collected("hello", limit=4000).submit(engine) for _ in range(4)]
        wait_until(lambda: engine.num_running == 4)
        waiting = [Collected("hello", limit=1).submit(engine) for _ in range(16)]
        response = web.post(COMPLETIONS, json=GOOD)
        error = error_of(response, 429)
        assert error["type"] == "rate_limit_error"
        assert int(response.headers["Retry-After"]) >= 1
        for each in running:
            engine.cancel(each.request)
        with client_of(address, max_retries=3) as client:
            assert client.completions.create(**GOOD).choices
        for each in waiting:
            each.wait()

    def test_a_time_limit(self, engine):
        with serving(create_app(engine, NAME, Limits(seconds=1e-3))) as address:
            with httpx.Client(base_url=address, timeout=60) as web:
                long = {**GOOD, "max_tokens": 4000}
                assert error_of(web.post(COMPLETIONS, json=long), 504)["code"] == "timeout"
                response = web.post(COMPLETIONS, json={**long, "stream": True})
                last = response.text.strip().splitlines()[-1].removeprefix("data: ")
                assert json.loads(last)["error"]["code"] == "timeout"
        wait_until(lambda: engine.num_running + engine.num_waiting == 0)

    def test_a_body_that_comes_slowly(self, engine):
        with serving(create_app(engine, NAME, Limits(body_seconds=0.2))) as address:
            with _connected(address) as connection:
                head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n"
                head += "Content-Type: application/json\r\n\r\n{"
                connection.sendall(head.encode())
                answer = b"".join(iter(lambda: connection.recv(10_000), b"")).decode()
            assert answer.startswith("HTTP/1.1 408 ")
            assert "did not arrive in time" in answer

    @pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: a\r\nX-Sl", b"GET / HTTP"])
    def test_a_head_that_comes_slowly(self, engine, monkeypatch, sent):
        """Also of the second request of a connection."""
        monkeypatch.setattr(server, "HEAD_SECONDS", 1.0)
        good = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
        with serving(create_app(engine, NAME)) as address:
            for first in (b"", good):
                with _connected(address) as connection:
                    if first:
                        connection.sendall(first)
                        _read_until(connection, lambda answer: b"ok" in answer)
                    connection.sendall(sent)
                    assert connection.recv(10_000) == b""

    def test_the_rest_of_a_body_that_nobody_reads(self, engine, monkeypatch):
        """The answer comes before it: the connection waits for it no longer than for a head."""
        monkeypatch.setattr(server, "HEAD_SECONDS", 1.0)
        with serving(create_app(engine, NAME)) as address, _connected(address) as connection:
            head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
            connection.sendall(head.encode())
            _read_until(connection, lambda answer: b"not_found" in answer or b"}" in answer)
            connection.sendall(b"x")
            assert connection.recv(10_000) == b""

    @pytest.mark.parametrize(
        "body", [{"prompt": [""] * 300_000}, {f"a{i}": 0 for i in range(100_000)}], ids=len
    )
    def test_one_error_is_enough(self, body):
        """Of many wrong parts: all of them would take seconds and gigabytes."""
        with pytest.raises(pydantic.ValidationError) as error:
            CompletionRequest.model_validate({"model": NAME, "prompt": "a", **body})
        assert error.value.error_count() < 10

    def test_an_answer_that_is_not_read(self, monkeypatch):
        monkeypatch.setattr(server, "WRITE_SECONDS", 0.2)
        ended = threading.Event()
        with serving(_large_answer(ended)) as address, _connected(address, 4096) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert ended.wait(timeout=30)  # as soon as there is nobody to write to
            assert sum(map(len, iter(lambda: connection.recv(2**20), b""))) < LARGE

    def test_an_answer_that_is_read_late(self, monkeypatch):
        """Its connection is kept, for longer than one that is not read."""
        monkeypatch.setattr(server, "WRITE_SECONDS", 1.0)
        with serving(_large_answer(threading.Event())) as address:
            with _connected(address, 4096) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                time.sleep(0.1)
                answer = _read_until(connection, lambda a: a.endswith(b"\r\n0\r\n\r\n"))
                assert answer.count(b"x") == LARGE
                connection.settimeout(1.2)
                with pytest.raises(TimeoutError):
                    connection.recv(1)

    def test_an_answer_may_take_longer_than_a_head(self, engine, monkeypatch):
        monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
        others = [Collected("hello", limit=4000).submit(engine) for _ in range(4)]

        def make_place():
            for each in others:
                engine.cancel(each.request)

        with serving(create_app(engine, NAME)) as address:
            timer = threading.Timer(0.5, make_place)
            timer.start()
            response = httpx.post(f"{address}{COMPLETIONS}", json=GOOD, timeout=60)
            assert response.status_code == 200


def _connected(address, buffer_size=None):
    host, port = address.removeprefix("http://").split(":")
    connection = socket.socket()
    if buffer_size is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_size)
    connection.settimeout(30)
    connection.connect((host, int(port)))
    return connection


def _read_until(connection, is_whole):
    """All that comes until it is whole. A connection that is closed before is an error."""
    answer = bytearray()
    while not is_whole(answer):
        piece = connection.recv(2**20)
        assert piece, bytes(answer[-100:])
        answer += piece
    return answer


LARGE = 2**24  # much more than the system keeps of what is not read


def _large_answer(ended):
    """An application that writes so many bytes."""

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for i in range(LARGE // 2**16):
            more = i + 1 < LARGE // 2**16
            await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": more})
        ended.set()

    return answer


def test_a_model_that_has_failed_for_good(lm, monkeypatch):
    def fail(*args):
        raise RuntimeError("a crash")

    engine = Engine(lm, max_sequences=1, max_tokens=64)
    engine.start()
    monkeypatch.setattr(Slots, "advance", fail)
    monkeypatch.setattr(Slots, "reset", fail)
    with serving(create_app(engine, NAME)) as address:

        def ask(status):  # the first answer ends its connection
            return error_of(httpx.post(f"{address}{COMPLETIONS}", json=GOOD), status)["message"]

        assert "a crash" in ask(500)
        wait_until(lambda: engine.failure is not None)
        assert ask(503) == "The server has failed."
        for path in ("/ready", "/health"):
            assert httpx.get(f"{address}{path}").status_code == 503
    engine.close()


def test_an_error_of_the_server_is_counted(web, address, monkeypatch):
    def fail(self):
        raise RuntimeError("a crash")

    def count():
        found = re.search(r'path="/v1/completions",status="500"} (\S+)', web.get("/metrics").text)
        return float(found.group(1)) if found else 0

    before = count()
    with monkeypatch.context() as context:
        context.setattr(Answer, "submit", fail)
        response = httpx.post(f"{address}{COMPLETIONS}", json=GOOD)  # it ends the connection
    assert "a crash" in error_of(response, 500)["message"]
    assert count() == before + 1


def test_garbage_instead_of_http(web, address):
    for garbage in (
        b"\x16\x03\x01\x02\x00",
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a" * 100_000,
    ):
        with _connected(address) as connection:
            connection.sendall(garbage)
            assert connection.recv(10_000).startswith(b"HTTP/1.1 400 ")


def test_clients_that_go_in_the_middle_of_a_stream(web, address, engine):
    async def go(client, i):
        body = {**GOOD, "max_tokens": 3000, "stream": True}
        async with client.stream("POST", f"{address}{COMPLETIONS}", json=body) as response:
            async for _ in response.aiter_bytes():
                return

    async def all_go():
        async with httpx.AsyncClient(timeout=60) as client:
            await asyncio.gather(*[go(client, i) for i in range(12)])

    asyncio.run(all_go())
    wait_until(lambda: engine.num_running + engine.num_waiting == 0)
