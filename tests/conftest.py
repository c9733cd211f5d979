"""Set before anything imports Keras. Fixtures that more than one module uses belong here."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The tests compare with float64. GPUs and TPUs would round float32 factors to fewer bits.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
