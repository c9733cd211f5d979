"""The chunk size of `ssd` that is fast on the platform. It changes results by rounding only."""

import keras

# Prefill of 512 tokens at 130M shapes on a CPU takes 0.49 / 0.44 / 0.48 / 0.57 s at chunk
# 32 / 64 / 128 / 256. 256 is what the checkpoints were trained with, on GPUs.
FASTEST = {"cpu": 64, "gpu": 256, "tpu": 256}


def default_chunk_size() -> int:
    if keras.config.backend() != "jax":
        return FASTEST["cpu"]
    import jax

    return FASTEST.get(jax.default_backend(), FASTEST["gpu"])
