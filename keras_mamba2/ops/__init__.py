"""Pure functions on tensors. Notation and shapes: `ops/ssd.py`."""

import keras

from keras_mamba2.ops.causal_conv import causal_conv1d as causal_conv1d
from keras_mamba2.ops.causal_conv import causal_conv1d_commit as causal_conv1d_commit
from keras_mamba2.ops.causal_conv import causal_conv1d_extend as causal_conv1d_extend
from keras_mamba2.ops.causal_conv import causal_conv1d_step as causal_conv1d_step
from keras_mamba2.ops.open_chunk import commit_chunk as commit_chunk
from keras_mamba2.ops.open_chunk import open_chunk_output as open_chunk_output

if keras.config.backend() == "jax":
    from keras_mamba2.ops.ssd_jax import ssd as ssd
    from keras_mamba2.ops.ssd_jax import ssd_step as ssd_step
else:
    from keras_mamba2.ops.ssd import ssd as ssd
    from keras_mamba2.ops.ssd import ssd_step as ssd_step
