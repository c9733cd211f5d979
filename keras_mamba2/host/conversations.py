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


def check_is_text(file, text: str) -> None:
    """Raises for a conversation: as a text, its JSON would go on, and be written over it.

    Raises:
        ValueError: that names the file.
    """
    if conversation_of(text) is not None:
        raise ValueError(
            f"{file} holds a conversation, not a text. `lm.resume_chat` goes on with a "
            "conversation, and so does `keras-mamba2 chat --load`."
        )
