"""Loads a checkpoint onto eight virtual devices, and prints what that took in memory, as JSON.

python -m tests.distribution.loading FOLDER DTYPE
"""

import json
import os
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import keras
import numpy as np

from keras_mamba2 import Mamba2HybridBackbone


def main(folder: str, dtype: str):
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], jax.devices())
    layout_map = Mamba2HybridBackbone.get_layout_map(mesh)
    with keras.distribution.ModelParallel(layout_map=layout_map).scope():
        before = resident("VmRSS")
        # A value that went to one device first, and from there to the others, is an error.
        with jax.transfer_guard_device_to_device("disallow_explicit"):
            backbone = Mamba2HybridBackbone.from_preset(folder, dtype=dtype)
        peak, after = resident("VmHWM"), resident("VmRSS")
    arrays = [variable.value for variable in backbone.weights]
    jax.block_until_ready(arrays)
    on_device = dict.fromkeys(jax.devices(), 0)
    for shard in (shard for array in arrays for shard in array.addressable_shards):
        on_device[shard.device] += shard.data.nbytes
    experts = [v for v in backbone.weights if "experts_up" in v.path]
    found = {
        "total": sum(array.nbytes for array in arrays),
        "largest": max(array.nbytes for array in arrays),
        "on_device": sorted(on_device.values()),
        "peak": peak - before,
        "after": after - before,
        "experts": [str(v.value.sharding.spec) for v in experts],
        "sums": [float(np.abs(np.asarray(a, "float64")).sum()) for a in arrays],
    }
    print(json.dumps(found), flush=True)


def resident(key: str) -> int:
    """In bytes: `VmRSS`, now, and `VmHWM`, at most since the process began."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
