"""Compiles exported programs with the compiler of TPUs: `python compile_for_tpu.py FILE ...`."""

import os
import pathlib
import sys

# Before JAX is imported. There is no chip, and none is needed.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
from jax import export
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

topology = topologies.get_topology_desc(topology_name="v6e:2x2x1", platform="tpu")
chip = NamedSharding(jax.sharding.Mesh(topology.devices[:1], ("x",)), PartitionSpec())
for file in sys.argv[1:]:
    program = export.deserialize(bytearray(pathlib.Path(file).read_bytes()))
    leaves = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=chip) for a in program.in_avals]
    args, _ = jax.tree.unflatten(program.in_tree, leaves)
    memory = jax.jit(program.call).lower(*args).compile().memory_analysis()
    print(pathlib.Path(file).stem, memory.argument_size_in_bytes, memory.temp_size_in_bytes)
