"""Room for tokens in states that keep something of every token: doubled when it is used up.

So few programs are compiled, however long a text becomes.
"""

LEAST_ROOM = 256


def room_for(num_tokens: int) -> int:
    """How many tokens a state for `num_tokens` has room for."""
    room = LEAST_ROOM
    while room < num_tokens:
        room *= 2
    return room
