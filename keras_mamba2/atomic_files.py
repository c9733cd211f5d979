"""Files and folders that appear when they are complete, or not at all.

What is written lies in a hidden folder beside its target, `.<name>.<random>.unfinished`, until it
is whole. Then it gets the name of the target by renaming. A process may be killed at any moment:

- A file, or a folder that was not there, is the old one or the new one: one renaming.
- A folder that replaces another takes two, since POSIX cannot replace a folder that has files in
  it. Between them nothing has the name, which a reader in another process may meet. Where the
  process dies there, both folders are whole, and `clean_up` does the second renaming: `from_preset`
  and the next writer call it.
- What a dead writer left is removed by the next writer of the same target. A lock, which the
  system takes from a process that dies, tells the living from the dead, and so also on a file
  system that several machines share, if it has locks.

Not promised: that data are on the disk when the power fails, since nothing waits for the disk; and
anything on file systems where renaming is not atomic, such as some for object stores.
"""

import contextlib
import os
import pathlib
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator

import filelock

SUFFIX = ".unfinished"
LOCK, NEW, OLD = "lock", "new", "old"


def check_is_free(folder) -> pathlib.Path:
    """The path of a folder that does not exist yet, or is empty.

    Raises:
        ValueError: if it has files in it, or as `replaced_folder`.
    """
    folder = _replaceable(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists already and is not an empty folder.")
    return folder


@contextlib.contextmanager
def atomic_folder(folder) -> Iterator[pathlib.Path]:
    """A temporary folder beside `folder`, which becomes it if nothing is raised.

    Raises:
        ValueError: if `folder` has files in it, or as `replaced_folder`.
    """
    folder = check_is_free(folder)
    with _beside(folder) as temporary:
        temporary.mkdir()
        yield temporary
        temporary.replace(folder)


@contextlib.contextmanager
def replaced_folder(folder) -> Iterator[pathlib.Path]:
    """A temporary folder beside `folder`, which takes its place if nothing is raised.

    The old one stays whole until then, and is removed with all files in it. See the top of this
    module for what holds if the process is killed.

    Raises:
        ValueError: if `folder` is a file, or a folder that cannot be renamed: the current one, or
            where a file system is mounted.
    """
    folder = _replaceable(folder)
    with _beside(folder) as temporary:
        temporary.mkdir()
        yield temporary
        if folder.is_dir() and any(folder.iterdir()):
            shutil.copymode(folder, temporary)
            folder.replace(temporary.parent.with_name(OLD))
        temporary.replace(folder)


def _replaceable(folder) -> pathlib.Path:
    """The folder that a path leads to, through links; it may be missing."""
    folder = pathlib.Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder.")
    if folder.is_dir() and (os.path.ismount(folder) or folder.samefile(os.curdir)):
        raise ValueError(
            f"{folder} is the current folder or a mounted file system, which cannot be replaced "
            "as a whole. Name a folder in it."
        )
    return folder


@contextlib.contextmanager
def atomic_file(file) -> Iterator[pathlib.Path]:
    """The path of a temporary file beside `file`, which takes its place if nothing is raised.

    Through links, and with the permissions of the old file, or usual ones.
    """
    file = pathlib.Path(os.path.realpath(file))
    if file.is_dir():
        raise ValueError(f"{file} is a folder.")
    with _beside(file) as temporary:
        yield temporary
        # Some libraries write files for the owner alone. The folder beside has usual permissions.
        like = file if file.exists() else temporary.parent
        temporary.chmod(stat.S_IMODE(like.stat().st_mode) & 0o666)
        temporary.replace(file)


def remove_folder(folder) -> None:
    """Removes a folder, which has lost its name before the first of its files is gone."""
    folder = pathlib.Path(os.path.abspath(folder))
    with _beside(folder) as temporary:
        folder.replace(temporary)


def clean_up(target) -> None:
    """Ends or removes what dead writers of `target` left beside it. It never raises `OSError`."""
    target = pathlib.Path(os.path.abspath(target))
    _clean_up(target.parent, re.escape(target.name))


def clean_up_in(folder) -> None:
    """Like `clean_up`, for all targets in `folder`."""
    _clean_up(pathlib.Path(os.path.abspath(folder)), ".+")


def _clean_up(parent: pathlib.Path, name: str) -> None:
    pattern = re.compile(rf"\.({name})\.[a-z0-9_]{{8}}{re.escape(SUFFIX)}", re.DOTALL)
    try:
        matches = [pattern.fullmatch(other) for other in os.listdir(parent)]
    except OSError:
        return
    for match in filter(None, matches):
        holder = parent / match[0]
        lock = filelock.FileLock(holder / LOCK)
        # A timeout: its writer lives. Another OSError: the files of another user.
        with contextlib.suppress(OSError):
            with lock.acquire(blocking=False):
                _settle(holder, parent / match[1])
                shutil.rmtree(holder, ignore_errors=True)


@contextlib.contextmanager
def _beside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A free path in a hidden folder beside `target`, with its name: endings tell formats."""
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_up(target)
    holder, lock = _holder(target)
    try:
        # Inside, so that it has usual permissions: those of `mkdtemp` are for the owner alone.
        (holder / NEW).mkdir()
        yield holder / NEW / target.name
    except Exception as error:
        error.add_note(f"{target} was not written. What was there before is unchanged.")
        raise
    finally:
        try:
            _settle(holder, target)
        finally:
            lock.release()
        shutil.rmtree(holder, ignore_errors=True)


def _holder(target: pathlib.Path) -> tuple[pathlib.Path, filelock.BaseFileLock]:
    while True:
        holder = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=SUFFIX, dir=target.parent)
        lock = filelock.FileLock(os.path.join(holder, LOCK))
        # Another writer may take it for that of a dead one until it is locked.
        with contextlib.suppress(filelock.Timeout, FileNotFoundError):
            lock.acquire(blocking=False)
            if os.path.exists(os.path.join(holder, LOCK)):
                return pathlib.Path(holder), lock
            lock.release()


def _settle(holder: pathlib.Path, target: pathlib.Path) -> None:
    """Gives `target` its name if a writer was stopped between the two renamings."""
    old, new = holder / OLD, holder / NEW / target.name
    if old.exists() and new.exists() and not target.exists():
        with contextlib.suppress(OSError):
            new.replace(target)
        if not target.exists():
            old.replace(target)
