"""Pure functions on tensors. Notation and shapes: `ops/ssd.py`."""

import keras

from keras_mamba2.ops.causal_conv import causal_conv1d as causal_conv1d
from keras_mamba2.ops.causal_conv import causal_conv1d_step as causal_conv1d_step

if keras.config.backend() == "jax":
    from keras_mamba2.ops.ssd_jax import ssd as ssd
    from keras_mamba2.ops.ssd_jax import ssd_step as ssd_step
else:
    from keras_mamba2.ops.ssd import ssd as ssd
    from keras_mamba2.ops.ssd import ssd_step as ssd_step
