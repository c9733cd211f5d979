"""What stands beside a state in the file of a conversation, and tells it from a text."""

import json
from typing import Any

KIND = "keras_mamba2 chat"


def conversation_of(text: str) -> dict[str, Any] | None:
    """What `Mamba2Chat.save` wrote as the text of a file; `None` for the text of a session."""
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):  # a text may be anything
        return None
    return stored if isinstance(stored, dict) and stored.get("kind") == KIND else None


def check_is_session(file, text: str, num_rows: int) -> None:
    """Raises for what is not one text.

    As a text, the JSON of a conversation would go on, and be written over it.

    Raises:
        ValueError: that names the file.
    """
    if num_rows != 1:
        raise ValueError(
            f"{file} holds a state of {num_rows} rows, and a session is one text. "
            "`Mamba2State.load(file, lm.backbone)` reads it for `generate` and `stream`."
        )
    if conversation_of(text) is not None:
        raise ValueError(
            f"{file} holds a conversation, not a text. `lm.resume_chat` goes on with a "
            "conversation, and so does `keras-mamba2 chat --load`."
        )
