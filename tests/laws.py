"""How many examples the laws of the state are tried on."""

import os

from hypothesis import settings

# `TIMES_THE_EXAMPLES=100 pytest tests/generation/test_laws.py` tries so many times more.
TIMES = int(os.environ.get("TIMES_THE_EXAMPLES", "1"))


def examples(number: int) -> settings:
    """Settings with so many examples, the same in every run."""
    return settings(deadline=None, derandomize=True, max_examples=number * TIMES)
