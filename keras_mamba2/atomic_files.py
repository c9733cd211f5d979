"""Files and folders that appear when they are complete, or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def atomic_folder(folder) -> Iterator[pathlib.Path]:
    """A temporary folder beside `folder`, which becomes it if nothing is raised.

    Raises:
        ValueError: if `folder` has files in it, or is a file.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not an empty folder.")
    with _beside(folder) as holder:
        # Inside, so that it has usual permissions: those of `mkdtemp` are for the owner alone.
        temporary = holder / folder.name
        temporary.mkdir()
        yield temporary
        temporary.replace(folder)


@contextlib.contextmanager
def atomic_file(file) -> Iterator[pathlib.Path]:
    """The path of a temporary file beside `file`, which takes its place if nothing is raised."""
    file = pathlib.Path(os.path.abspath(file))
    if file.is_dir():
        raise ValueError(f"{file} is a folder.")
    with _beside(file) as holder:
        yield holder / file.name
        (holder / file.name).replace(file)


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield holder
    finally:
        shutil.rmtree(holder, ignore_errors=True)
