"""Runs a guide, in which a replica is killed: `python kill_replica.py PRESET FOLDER`.

`guides/serve_many.py`, in a process of its own, since it starts Ray. The turns of all conversations
are written to a file of the folder.
"""

import dataclasses
import json
import pathlib
import sys

import ray
import serve_many as guide  # found by PYTHONPATH, also by Ray's processes
from ray import serve

preset, folder = sys.argv[1], pathlib.Path(sys.argv[2])
address = guide.start(preset, replicas=2, compilation_cache=str(folder / "compiled"))
guide.wait_for(address, 2)
turns = guide.show(address, preset, replicas=2, count=4, max_tokens=40, temperature=0)
found = [[dataclasses.asdict(turn) for turn in mine] for mine in turns]
(folder / "found.json").write_text(json.dumps(found))  # Ray itself prints to stdout
serve.shutdown()
ray.shutdown()
