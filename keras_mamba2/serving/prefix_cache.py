"""States after the beginnings of texts, so that what many texts begin with is read once."""

import collections
import hashlib
import pathlib

import numpy as np

from keras_mamba2.serving.prefix_folder import Known
from keras_mamba2.serving.prefix_folder import PrefixFolder
from keras_mamba2.serving.prefix_folder import key_of
from keras_mamba2.state import NO_TOKEN
from keras_mamba2.state import Mamba2State
from keras_mamba2.state.host import on_host
from keras_mamba2.tasks.known_prefixes import common_length

# A state is not worth its bytes for fewer tokens.
SHORTEST = 32
# The last prompts, with which a new one is compared.
REMEMBERED = 64


class PrefixCache:
    """States by the hash of the tokens that they have read. Those not used for longest go first.

    They are kept in the memory of the host. Where two prompts part, a third one is likely to: so
    `meeting` tells how much of a prompt an earlier one had too, for a state to be kept there.

    Args:
        backbone: the model's backbone. The states are of this one, and no other's are accepted.
        max_bytes: int, how many bytes of states are kept.
        folder: path, where a thread writes them, and from where they are read at the start.
        shortest: int, texts of fewer tokens are not kept.
    """

    def __init__(
        self,
        backbone,
        max_bytes: int,
        folder: pathlib.Path | None = None,
        shortest: int = SHORTEST,
    ):
        self.max_bytes = max_bytes
        self.shortest = shortest
        self.nbytes = self.hits = self.misses = self.evictions = 0
        self._backbone = backbone
        self._known: collections.OrderedDict[bytes, Known] = collections.OrderedDict()
        self._prompts: collections.deque[np.ndarray] = collections.deque(maxlen=REMEMBERED)
        self._folder = None if folder is None else PrefixFolder(folder, backbone)
        if self._folder is not None:
            for known in self._folder.read():
                self._keep(known)

    def __len__(self) -> int:
        return len(self._known)

    def longest(self, token_ids: np.ndarray) -> Known | None:
        """The longest known text that `token_ids` begin with."""
        found = None
        for key in self._keys(token_ids):
            found = key if key in self._known else found
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        known = self._known[found]
        self._use(found, known)
        return known

    def meeting(self, token_ids: np.ndarray) -> int:
        """How many tokens `token_ids` have in common with one of the last prompts, at most.

        Remembers them for the next call.
        """
        shared = max((common_length(token_ids, prompt) for prompt in self._prompts), default=0)
        self._prompts.append(token_ids)
        return shared

    def wants(self, token_ids: np.ndarray) -> bool:
        """Whether a state after `token_ids` would be kept."""
        return self.max_bytes > 0 and len(token_ids) >= self.shortest

    def add(self, token_ids: np.ndarray, state: Mamba2State) -> None:
        """Keeps `state`, a batch of one that has read `token_ids`, all of them."""
        if self.wants(token_ids):
            token_ids = np.array(token_ids, "int32")
            state = on_host(state, self._backbone).with_token(np.array([NO_TOKEN], "int32"))
            self._keep(Known(token_ids, state))

    def close(self) -> None:
        """Waits until all states are in the folder, if there is one."""
        if self._folder is not None:
            self._folder.close()

    def _keep(self, known: Known) -> None:
        key, size = key_of(known.token_ids), known.state.nbytes
        if size > self.max_bytes:
            self._forget(key)
            return
        if key not in self._known:
            self._known[key] = known
            self.nbytes += size
        self._use(key, known)
        while self.nbytes > self.max_bytes:
            oldest, dropped = self._known.popitem(last=False)
            self.nbytes -= dropped.state.nbytes
            self.evictions += 1
            self._forget(oldest)

    def _use(self, key: bytes, known: Known) -> None:
        self._known.move_to_end(key)
        if self._folder is not None:
            self._folder.keep(key, known)

    def _forget(self, key: bytes) -> None:
        if self._folder is not None:
            self._folder.remove(key)

    def _keys(self, token_ids: np.ndarray) -> list[bytes]:
        """The keys of the beginnings of `token_ids` that have the length of a known text."""
        lengths = sorted({len(known.token_ids) for known in self._known.values()})
        digest, start, keys = hashlib.sha256(), 0, []
        token_ids = np.ascontiguousarray(token_ids, "<i4")
        for end in lengths:
            if end > len(token_ids):
                break
            digest.update(token_ids[start:end].tobytes())
            keys.append(digest.copy().digest())
            start = end
        return keys
