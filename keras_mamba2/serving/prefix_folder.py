"""A folder of states, written by a thread of its own while others are served."""

import collections
import hashlib
import json
import logging
import pathlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from keras_mamba2.atomic_files import clean_up_in
from keras_mamba2.host.state_file import FILE_VERSION
from keras_mamba2.state import Mamba2State
from keras_mamba2.state import files
from keras_mamba2.state.host import on_host

logger = logging.getLogger(__name__)
SUFFIX = ".safetensors"


class Known(NamedTuple):
    """The state after `token_ids`, in the memory of the host."""

    token_ids: np.ndarray
    state: Mamba2State


class PrefixFolder:
    """Files of states, by key. What should be there is said at once, and done a little later.

    For each key only the last word counts, so what waits is never more than what is known, and a
    disk that is too slow is not written to as often. A process that is killed loses what waits;
    every file that is there is whole.

    Args:
        folder: path.
        backbone: the model's backbone. Apart by its weights and by what its states are, so that
            servers of several models, and of one in several dtypes, may share a folder.
    """

    def __init__(self, folder: pathlib.Path, backbone):
        self._backbone = backbone
        self._fingerprint = files.fingerprint(backbone)
        specs = {name: repr(spec) for name, spec in files.named_specs(backbone).items()}
        states = [FILE_VERSION, self._fingerprint, backbone.architecture, specs]
        self._folder = folder / hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._there: set[bytes] = set()  # keys with a file, or with one that is being written
        self._waiting: collections.OrderedDict[bytes, Known | None] = collections.OrderedDict()
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="prefix folder", daemon=True)

    def read(self) -> Iterator[Known]:
        """What is there, the last used at the end. What cannot be used is told, and removed."""
        clean_up_in(self._folder)
        for file in sorted(self._folder.glob(f"*{SUFFIX}"), key=_last_use):
            try:
                known = self._read(file)
            except (OSError, ValueError, OverflowError) as error:
                logger.warning("Not used as a known prefix: %s", error)
                if not isinstance(error, OSError):
                    file.unlink(missing_ok=True)
            else:
                self._there.add(key_of(known.token_ids))
                yield known

    def keep(self, key: bytes, known: Known) -> None:
        """Says that there should be a file, and that it was used now."""
        with self._changed:
            self._waiting[key] = known
            self._waiting.move_to_end(key)
            self._wake()

    def remove(self, key: bytes) -> None:
        """Says that there should be no file."""
        with self._changed:
            self._waiting.pop(key, None)
            if key in self._there:
                self._waiting[key] = None
                self._wake()

    def close(self) -> None:
        """Waits until all is done, and ends."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _wake(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._changed.notify()

    def _run(self) -> None:
        while (next_one := self._next()) is not None:
            try:
                self._do(*next_one)
            except Exception as error:  # whatever it is, the next state may be written
                logger.warning("A known prefix was not written: %s", error)

    def _next(self) -> tuple[bytes, Known | None, bool] | None:
        """What to do, and whether there is a file already; `None` at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            if not self._waiting:
                return None
            key, known = self._waiting.popitem(last=False)
            is_there = key in self._there
            (self._there.discard if known is None else self._there.add)(key)
            return key, known, is_there

    def _do(self, key: bytes, known: Known | None, is_there: bool) -> None:
        file = self._folder / f"{key.hex()}{SUFFIX}"
        if known is None:
            file.unlink(missing_ok=True)
        elif is_there and file.exists():
            file.touch()  # so that their times have the order in which they were used
        else:
            text = json.dumps(known.token_ids.tolist())
            files.save(file, known.state, self._backbone, text, self._fingerprint)

    def _read(self, file: pathlib.Path) -> Known:
        *parts, text = files.load(file, self._backbone, self._fingerprint)
        state = on_host(Mamba2State(*parts), self._backbone)
        token_ids = np.array(json.loads(text), "int32")
        if file.stem != key_of(token_ids).hex() or state.length.tolist() != [len(token_ids)]:
            raise ValueError(f"{file} is the state after another text than its name says.")
        return Known(token_ids, state)


def key_of(token_ids: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(token_ids, "<i4").tobytes()).digest()


def _last_use(file: pathlib.Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # another server has removed it
        return 0
