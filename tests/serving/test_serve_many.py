"""`guides/serve_many.py` with local Ray, and a replica that is killed."""

import itertools
import json
import os
import pathlib
import subprocess
import sys
from importlib.util import find_spec

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def conversations(preset_folder, tmp_path_factory):
    """The turns of each."""
    folder = tmp_path_factory.mktemp("serve_many")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "guides"))),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else they wait for the tests beside them
    }
    command = [sys.executable, HERE / "kill_replica.py", preset_folder, folder]
    command = list(map(str, command))
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((folder / "found.json").read_text())


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (find_spec("ray") and find_spec("mmh3")), reason="no ray[serve]"),
]


def test_nothing_is_lost_and_nothing_twice(conversations, lm):
    """Each text is that of `lm.generate`, turn by turn, whoever has written it."""
    for i, turns in enumerate(conversations):
        text = ""
        said = [f"Scene {i}. A room in the palace of the king.\n\nCITIZEN:"]
        said += [f"\n\nSERVANT {i}:", "\n\nCITIZEN:", f"\n\nSERVANT {i}:"]
        for words, limit, turn in zip(said, (40, 2000, 40, 40), turns, strict=True):
            text += words
            arguments = {"max_new_tokens": limit, "temperature": 0.0, "strip_prompt": True}
            assert turn["text"] == lm.generate(text, **arguments)
            text += turn["text"]


def test_conversations_stay_where_they_are_known(conversations):
    victim = conversations[0][0]["replica"]
    for first, second, *_ in conversations:
        assert first["cached_tokens"] == 0
        if first["replica"] != victim:
            assert second["replica"] == first["replica"]
            assert second["cached_tokens"] >= first["prompt_tokens"] - 1


def test_those_of_a_killed_replica_go_on(conversations):
    victim = conversations[0][0]["replica"]
    assert any(second["retries"] for _, second, *_ in conversations)  # it was at work
    assert conversations[0][1]["replica"] != victim
    for turns in conversations:
        *_, third, fourth = turns
        for before, after in itertools.pairwise(turns):
            known = after["replica"] == before["replica"]
            assert (after["cached_tokens"] >= before["prompt_tokens"] - 1) == known
            assert (after["cached_tokens"] == 0) == (not known)
        assert victim not in (third["replica"], fourth["replica"])
        assert third["replica"] == fourth["replica"]  # all are there again, and stay
