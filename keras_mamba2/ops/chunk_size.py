"""The chunk size of `ssd` that is fast on the platform. It changes results by rounding only."""

import keras

from keras_mamba2.ops.platform import platform

# A prefill of 512 on two CPU cores, tokens/s at chunk 32 / 64 / 128 / 256:
#   130M, float32             1027 / 1185 / 1165 / 944
#   130M, bfloat16            1121 / 1106 / 999 / 939
#   2.7B, float32, 6 layers    483 / 484 / 501 / 466
# so one value serves all shapes. On a TPU, 256 moves the fewest bytes for long blocks, and no more
# than other sizes for short ones: see benchmarks/README.md. On an H100 8192 tokens of 130M in
# bfloat16 take 48 ms at 128 and 36 ms at 256, the value that the checkpoints were trained with.
FASTEST = {"cpu": 64, "gpu": 256, "tpu": 256}


def default_chunk_size() -> int:
    if keras.config.backend() != "jax":
        return FASTEST["cpu"]
    return FASTEST.get(platform(), FASTEST["gpu"])
