"""From `import keras_mamba2` to the first token of exported programs, in seconds.

It imports what the programs need and nothing else: run it in an environment without Keras.
"""

import sys
import time

begun = time.perf_counter()


def seconds() -> str:
    return f"{time.perf_counter() - begun:.2f} s"


if __name__ == "__main__":
    import keras_mamba2

    print(f"imported after {seconds()}")
    programs = keras_mamba2.load_programs(sys.argv[1])
    print(f"loaded after {seconds()}")
    pieces = programs.stream("ROMEO:", max_new_tokens=100, seed=1)
    next(pieces)
    print(f"first token after {seconds()}")
    for _ in pieces:
        pass
    print(f"100 tokens after {seconds()}")
