import contextlib
import socket
import threading
import time

import openai
import pytest
import uvicorn

import keras_mamba2
from keras_mamba2.serving.app import create_app
from keras_mamba2.serving.engine import Engine
from keras_mamba2.serving.server import PatientForAWhile
from tests.chat import templates

NAME = "small"


@pytest.fixture(scope="session")
def lm(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler=keras_mamba2.FilterSampler())
    return lm


@pytest.fixture(scope="session")
def engine(lm):
    engine = Engine(lm, max_sequences=4, max_waiting=16, max_tokens=4096, block_size=32)
    engine.start()
    yield engine
    engine.close()


@contextlib.contextmanager
def serving(app):
    """The address of a server in a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        # Without its lifespan, at whose end the engine, which other tests have too, is closed.
        options = {"http": PatientForAWhile, "ws": "none", "lifespan": "off"}
        config = uvicorn.Config(app, **options, log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def address(engine):
    with serving(create_app(engine, NAME)) as address:
        yield address


def client_of(address, **options):
    options = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
    return openai.OpenAI(base_url=f"{address}/v1", **options)


@pytest.fixture(scope="session")
def client(address):
    with client_of(address) as client:
        yield client


@pytest.fixture(scope="session")
def keyed_address(engine):
    app = create_app(engine, NAME, api_keys=["secret", "other"])
    with serving(app) as address:
        yield address


@pytest.fixture
def template(lm, monkeypatch):
    """A template for the model, for the time of a test."""
    template = keras_mamba2.ChatTemplate(templates.CHATML)
    monkeypatch.setattr(lm.preprocessor.tokenizer, "chat_template", template)
    return template
