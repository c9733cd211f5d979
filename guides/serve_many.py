"""Serves a model from several processes or machines, with Ray Serve.

    pip install "ray[serve]>=2.60" ".[serve]" openai
    python guides/serve_many.py  # shows what is said here, in about a minute

Each replica is a process with the application of `keras-mamba2 serve`, behind one address. A state
that a replica has kept is in its own memory. So a conversation sends its name with each request, as
`x-session-id`, and Ray's consistent hashing leads all requests of one name to one replica, which
reads only what is new:

    client = openai.OpenAI(base_url=..., default_headers={"x-session-id": "conversation 7"})

Requests that share a long beginning, such as a system message, may as well share a name. Those
without one are spread evenly.

When a replica dies, what it was at fails, and the client asks again: `openai`'s does it by itself
until an answer has begun, and `Conversation` after that. Another replica answers: a text depends on
its prompt and its seed, and on nothing else. The conversations of the dead one are read anew, once,
by those that take them over; the others stay where they are. Ray starts another replica, which gets
its share of the conversations.

On a cluster, from this folder:

    serve run serve_many:application preset=mamba2_tiny_shakespeare replicas=4
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from collections.abc import Mapping
from typing import Annotated
from typing import Any

import httpx
import openai
import ray
import typer
from ray import serve
from ray.serve.config import RequestRouterConfig

STICKY = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
# Of `Replica`, each for itself.
SEQUENCES, WAITING = 4, 64


class NamesReplica:
    """Tells clients who has answered, which is of no use but to see that it works."""

    def __init__(self, app, name: str):
        self.app, self.name = app, name.encode()

    async def __call__(self, scope, receive, send):
        async def send_with_name(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-replica", self.name)]
            await send(message)

        await self.app(scope, receive, send_with_name)


@serve.deployment(
    max_ongoing_requests=SEQUENCES + WAITING,  # the engine itself says when it is too much
    request_router_config=RequestRouterConfig(request_router_class=STICKY),
    ray_actor_options={"num_cpus": 0.5},  # so that two fit anywhere; or {"num_gpus": 1}
    health_check_period_s=2,
)
@serve.ingress()
class Replica:
    """A process with a model and its server.

    Args:
        preset: the name of a preset, a folder, or hf://user/name.
        name: string, what clients call the model.
        compilation_cache: path of a folder where compiled programs are kept.
    """

    def __init__(self, preset: str, name: str, compilation_cache: str | None):
        import keras_mamba2
        from keras_mamba2.serving.engine import Engine

        self.name = name
        lm = keras_mamba2.Mamba2CausalLM.from_preset(preset)
        lm.compile(compilation_cache=compilation_cache)
        self.engine = Engine(lm, max_sequences=SEQUENCES, max_waiting=WAITING)
        self.engine.start()

    def __serve_build_asgi_app__(self):
        from keras_mamba2.serving.app import create_app

        app = create_app(self.engine, self.name)
        app.add_middleware(NamesReplica, name=f"{socket.gethostname()}:{os.getpid()}")
        return app

    def check_health(self) -> None:
        """Ray starts the replica anew if this raises."""
        if self.engine.failure is not None:
            raise RuntimeError("The engine has failed.") from self.engine.failure


def application(arguments: Mapping[str, Any]) -> serve.Application:
    """What `serve run` serves.

    Args:
        arguments: `preset`; optionally `name`, `replicas`, which are 2 otherwise, and
            `compilation_cache`.
    """
    preset = arguments["preset"]
    replicas = Replica.options(num_replicas=int(arguments.get("replicas", 2)))
    return replicas.bind(preset, arguments.get("name", preset), arguments.get("compilation_cache"))


@dataclasses.dataclass
class Turn:
    """An answer, and what it took."""

    text: str
    replica: str
    prompt_tokens: int
    cached_tokens: int
    retries: int


Seen = Callable[[str], None]


class Conversation:
    """A text that grows, turn by turn. Whoever answers, it goes on from all of it.

    Args:
        address: string, of the server.
        model: string.
        name: string, of the conversation.
        retries: int, how often a request is sent again when nobody has answered it.
    """

    def __init__(self, address: str, model: str, name: str, retries: int = 10):
        self.client = openai.OpenAI(
            base_url=f"{address}/v1",
            api_key="none",
            max_retries=retries,
            default_headers={"x-session-id": name},
        )
        self.model = model
        self.text = ""

    def ask(self, text: str, seen: Seen | None = None, **options: Any) -> Turn:
        """Says `text`, and lets the model go on. Options are those of a completion.

        `seen` is called with the replica of each piece of text.
        """
        prompt = self.text + text
        for broken in range(self.client.max_retries + 1):
            # An answer that has begun is not asked for again by `openai`.
            with contextlib.suppress(openai.APIConnectionError):
                turn = self._answer(prompt, seen, options)
                self.text = prompt + turn.text
                return dataclasses.replace(turn, retries=turn.retries + broken)
        raise ConnectionError(f"{self.client.max_retries + 1} answers in a row broke off.")

    def _answer(self, prompt: str, seen: Seen | None, options: dict[str, Any]) -> Turn:
        response = self.client.completions.with_raw_response.create(
            model=self.model,
            prompt=prompt,
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
        replica = response.headers["x-replica"]
        new, usage = "", None
        for piece in response.parse():
            if seen is not None:
                seen(replica)
            new += "".join(choice.text for choice in piece.choices)
            usage = piece.usage or usage
        cached = usage.prompt_tokens_details.cached_tokens
        return Turn(new, replica, usage.prompt_tokens, cached, response.retries_taken)


def start(preset: str, replicas: int, compilation_cache: str) -> str:
    """Serves on this machine. Returns the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A machine that is busy compiling needs longer than Ray gives it.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    ray.init(num_cpus=replicas, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    given = {"preset": preset, "replicas": replicas, "compilation_cache": compilation_cache}
    serve.run(application(given))
    return f"http://127.0.0.1:{port}"


def kill(replica: str) -> None:
    """Ends a process of this machine as a machine that fails ends it."""
    with contextlib.suppress(ProcessLookupError):  # it is dead already
        os.kill(int(replica.split(":")[1]), signal.SIGKILL)


def wait_for(address: str, replicas: int, dead: str = "", seconds: float = 300) -> None:
    """Until so many replicas have answered, and the dead one is none of them."""
    found: set[str] = set()
    end = time.monotonic() + seconds
    while len(found) < replicas:
        if time.monotonic() > end:
            raise TimeoutError(f"Only {len(found)} of {replicas} replicas answer.")
        with contextlib.suppress(httpx.HTTPError):
            found |= {httpx.get(f"{address}/ready").headers.get("x-replica", dead)} - {dead}
        time.sleep(0.5)


def show(address: str, model: str, replicas: int, count: int = 6, **options: Any) -> list:
    """Conversations of four turns each; a replica is killed while it is at the second.

    Returns:
        For each conversation its turns.
    """
    talks = [Conversation(address, model, f"scene {i}") for i in range(count)]
    turns: list[list[Turn]] = [[] for _ in talks]

    def say(text: str, seen: Seen | None = None, **others: Any) -> None:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            asked = [
                pool.submit(talk.ask, text.format(i), seen, **{**options, **others})
                for i, talk in enumerate(talks)
            ]
            for mine, turn in zip(turns, asked, strict=True):
                mine.append(turn.result())

    say("Scene {}. A room in the palace of the king.\n\nCITIZEN:")
    victim = turns[0][0].replica
    # It is at work when somebody sees text of it, and 2,000 tokens take longer than to kill it.
    say("\n\nSERVANT {}:", lambda at: kill(at) if at == victim else None, max_tokens=2_000)
    wait_for(address, replicas, dead=victim)
    say("\n\nCITIZEN:")
    say("\n\nSERVANT {}:")
    return turns


def main(
    preset: Annotated[str, typer.Argument()] = "mamba2_tiny_shakespeare",
    replicas: Annotated[int, typer.Option(min=2)] = 2,
) -> None:
    """Shows that conversations stay where their states are, and survive a replica."""
    with tempfile.TemporaryDirectory() as compiled:
        address = start(preset, replicas, compiled)
        wait_for(address, replicas)
        turns = show(address, preset, replicas, max_tokens=60, temperature=0.8, seed=1)
    print("turn: its replica, tokens of its prompt, those of them that were known, asked again")
    for i, mine in enumerate(turns):
        print(f"scene {i}")
        for turn in mine:
            print(f"  {turn.replica} {turn.prompt_tokens:6} {turn.cached_tokens:6} {turn.retries}")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    typer.run(main)
