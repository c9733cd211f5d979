from typing import Any
from typing import NamedTuple


class OpenChunk(NamedTuple):
    """Tokens that a model has read after a state, and that may be taken back.

    The state stays as it was until the first of them are made part of it. So it is written once
    for several tokens, and whoever proposed wrong tokens has nothing to restore.
    """

    token_ids: Any  # int32 (b q)
    layers: tuple[Any, ...]  # of the blocks' sublayers
