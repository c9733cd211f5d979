"""Runs a guide with a worker that is killed: `python kill_workers.py FOLDER WHEN`.

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
folder, when = pathlib.Path(sys.argv[1]), sys.argv[2]


class KilledOnce(guide.Replica):
    """One of them dies, before or after its first file is written."""

    def __call__(self, batch):
        result = super().__call__(batch) if when == "after" else None
        try:
            (folder / f"killed {when}").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
        return result or super().__call__(batch)


if __name__ == "__main__":
    paths = [str(ROOT), str(GUIDE.parent)]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment})
    replica = guide.Replica if when == "never" else KilledOnce
    folders = folder / "programs", folder / "prompts", folder / "results"
    texts = guide.run(*folders, batch_size=4, replica=replica, max_new_tokens=12, seed=1)
    (folder / "texts.json").write_text(json.dumps(texts))
