"""Runs a guide with workers that are killed: `python kill_workers.py FOLDER`.

`guides/batch_inference.py`, in a process of its own, since JAX does not like to be forked.
"""

import importlib.util
import json
import os
import pathlib
import signal
import sys

import ray

ROOT = pathlib.Path(__file__).parents[2]
GUIDE = ROOT / "guides" / "batch_inference.py"
spec = importlib.util.spec_from_file_location("batch_inference", GUIDE)
guide = importlib.util.module_from_spec(spec)
sys.modules["batch_inference"] = guide
spec.loader.exec_module(guide)
folder = pathlib.Path(sys.argv[1])


class Replica(guide.Replica):
    def __init__(self, *args):
        for name in ("keras", "keras_hub", "tensorflow"):
            sys.modules[name] = None  # as if it was not installed
        super().__init__(*args)


class Killed(Replica):
    """One of them dies before it has written a file, and one right after it has written one."""

    def __call__(self, batch):
        self.die_once("before")
        result = super().__call__(batch)
        self.die_once("after")
        return result

    def die_once(self, when):
        try:
            (folder / f"killed {when}").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    paths = [str(ROOT), str(GUIDE.parent)]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment})
    folders = folder / "programs", folder / "prompts", folder / "results"
    arguments = {"batch_size": 4, "max_new_tokens": 12, "seed": 1}
    killed = guide.run(*folders, replica=Killed, **arguments)
    # As after a run that was stopped: what is there stays, what is missing comes.
    files = sorted(folders[-1].glob("*.jsonl"))
    files[0].unlink()
    times = [file.stat().st_mtime_ns for file in files[1:]]
    again = guide.run(*folders, replicas=1, replica=Replica, **arguments)
    untouched = [file.stat().st_mtime_ns for file in files[1:]] == times
    found = {"killed": killed, "again": again, "untouched": untouched}
    (folder / "found.json").write_text(json.dumps(found))  # Ray itself prints to stdout
