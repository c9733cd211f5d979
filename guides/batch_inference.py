"""Continues a folder of prompts on any number of machines, with Ray Data.

    pip install "ray[data]"
    keras-mamba2 export-programs mamba2_tiny_shakespeare programs --platform cpu --batch-size 8
    python guides/batch_inference.py programs prompts results --replicas 2

`prompts` holds files of JSON Lines, `*.jsonl`, each line with an `id` and a `prompt`; `results`
gets such files with an `id` and a `text`. On a cluster, run it on the head node, with folders
that all machines share.

A replica is a process with the programs in memory. It needs no Keras, and is there in seconds.
Each batch of results is a file that appears when it is complete, and is named by its prompts:

- A worker that dies loses the batch it was at. Ray starts it again, and that batch too. If its
  file was there already, the same file takes its place: texts depend on their prompts and the
  seed, and on nothing else. Only equal prompts of one batch are told apart by their order.
- A run that is stopped goes on when it is started again: prompts that have a text are left out.
"""

import hashlib
import json
import pathlib
from typing import Annotated
from typing import Any

import numpy as np
import typer


class Replica:
    """A model in a process of its own, which continues batches of prompts.

    Args:
        programs: the path of a folder of `export_programs`.
        results: the path of the folder for the texts.
        arguments: of `Programs.generate`.
    """

    def __init__(self, programs: str, results: str, arguments: dict[str, Any]):
        import keras_mamba2  # only here: the process that hands out the work needs no model

        self.programs = keras_mamba2.load_programs(programs)
        self.results = pathlib.Path(results)
        self.arguments = arguments

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from keras_mamba2.atomic_files import atomic_file

        ids = list(map(str, batch["id"]))
        texts = self.programs.generate(list(map(str, batch["prompt"])), **self.arguments)
        lines = [json.dumps({"id": id, "text": text}) for id, text in zip(ids, texts, strict=True)]
        name = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:20]
        with atomic_file(self.results / f"{name}.jsonl") as temporary:
            temporary.write_text("\n".join(lines) + "\n", "utf-8")
        return {"id": batch["id"]}


def read(folder: pathlib.Path, key: str) -> dict[str, str]:
    """What the JSON Lines of a folder have under `key`, by their ids.

    Not with `ray.data.read_json`, which makes numbers of the ids "007" and "1e5".

    Raises:
        ValueError: for an id that is there twice.
    """
    files = sorted(folder.glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text("utf-8").split("\n")]
    found: dict[str, str] = {}
    for row in (json.loads(line) for line in lines if line.strip()):
        id = str(row["id"])
        if id in found:
            raise ValueError(f"The id {id!r} is in {folder} twice.")
        found[id] = row[key]
    return found


def run(
    programs: pathlib.Path,
    prompts: pathlib.Path,
    results: pathlib.Path,
    replicas: int = 2,
    batch_size: int = 8,
    replica: type[Replica] = Replica,
    **arguments: Any,
) -> dict[str, str]:
    """Continues the prompts that have no text yet. Returns the texts of all.

    Args:
        programs: the path of a folder of `export_programs`.
        prompts: the path of a folder of JSON Lines, files that end with `.jsonl`.
        results: the path of a folder, which is made if it is not there.
        replicas: int, how many processes hold the model.
        batch_size: int, of the programs: prompts that a replica continues together.
        replica: class of the processes.
        **arguments: of `Programs.generate`.
    """
    import ray

    results.mkdir(parents=True, exist_ok=True)
    known, done = read(prompts, "prompt"), read(results, "text")
    if not known:
        raise ValueError(f"There are no prompts in files {prompts}/*.jsonl.")
    todo = [{"id": id, "prompt": prompt} for id, prompt in known.items() if id not in done]
    if not todo:
        return done
    batches = ray.data.from_items(todo).map_batches(
        replica,
        fn_constructor_args=(str(programs.absolute()), str(results.absolute()), arguments),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=replicas),
        num_cpus=0.5,  # not all that there are, or nothing is left to read with; or num_gpus=1
        max_task_retries=3,  # of a batch, when its worker dies; by default without end
    )
    for _ in batches.iter_batches():  # runs it; the texts themselves stay where they are written
        pass
    return read(results, "text")


def main(
    programs: Annotated[pathlib.Path, typer.Argument(help="Of keras-mamba2 export-programs.")],
    prompts: Annotated[pathlib.Path, typer.Argument(help="A folder of JSON Lines: id, prompt.")],
    results: Annotated[pathlib.Path, typer.Argument(help="A folder for the texts.")],
    replicas: Annotated[int, typer.Option(min=1)] = 2,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    seed: int = 0,
) -> None:
    """Continues a folder of prompts on any number of machines."""
    texts = run(
        programs, prompts, results, replicas, batch_size, max_new_tokens=max_new_tokens, seed=seed
    )
    print(f"{len(texts)} texts in {results}")


if __name__ == "__main__":
    typer.run(main)
