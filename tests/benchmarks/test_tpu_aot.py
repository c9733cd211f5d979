"""What the TPU compiler makes of generation, read from the program that it schedules.

Two layers as wide as those of 2.7B: at batch 64 the state of one does not fit on the chip.
"""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import jax
import pytest
from jax import lax
from jax import numpy as jnp

from benchmarks.programs import product_flops
from benchmarks.rounds import HERE
from benchmarks.workload import of_size

WORKLOAD = replace(of_size("2.7b", dtype="bfloat16", chunk_size=256), num_layers=2)
TOKENS = 2048
needs_compiler = pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu is not installed")


@pytest.fixture(scope="module")
def programs(tmp_path_factory, without_flags):
    file = tmp_path_factory.mktemp("tpu") / "results" / "found.json"
    command = [sys.executable, "-m", "benchmarks.tpu_aot", "--size=2.7b", "--layers=2"]
    command += ["--subject=keras_mamba2", f"--prefill-tokens={TOKENS}", f"--file={file}"]
    subprocess.run(command, cwd=HERE.parent, env=without_flags, check=True)
    rows = json.loads(file.read_text())["programs"]
    return {(row["program"], row["batch_size"]): row for row in rows}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("batch_size", [1, 64])
class TestDecode:
    def test_is_one_loop_that_stays_on_the_chip(self, programs, batch_size):
        found = programs["decode", batch_size]
        assert (found["loops"], found["host_transfers"]) == (1, [])

    def test_a_step_moves_the_weights_and_the_state_and_little_more(self, programs, batch_size):
        moved = programs["decode", batch_size]["hbm_gb"]
        least = WORKLOAD.decode_bytes(batch_size) / 1e9
        # Less than the least: what stays on the chip from step to step.
        assert 0.7 * least < moved < 1.1 * least

    def test_the_state_is_updated_in_place_and_no_weight_is_copied(self, programs, batch_size):
        found = programs["decode", batch_size]
        assert found["aliased_gb"] == pytest.approx(
            WORKLOAD.state_bytes(batch_size) / 1e9, 0.02, 6e-4
        )
        assert found["temporaries_gb"] < 0.05 * found["arguments_gb"]


@pytest.mark.slow
@needs_compiler
class TestPrefill:
    def test_does_the_operations_counted_by_hand(self, programs):
        found = programs["prefill", 1]
        assert found["product_gflop"] == pytest.approx(found["gflop_by_hand"], rel=0.05)
        assert found["host_transfers"] == []

    def test_moves_few_activations(self, programs):
        """Less than three times the widest, which in_proj makes."""
        d, n = WORKLOAD.hidden_dim, WORKLOAD.state_dim
        widest = 2 * TOKENS * (4 * d + 2 * n + WORKLOAD.num_heads)
        least = WORKLOAD.decode_bytes(1) - 2 * WORKLOAD.vocabulary_size * d
        moved = 1e9 * programs["prefill", 1]["hbm_gb"]
        assert moved < least + 3 * WORKLOAD.num_layers * widest


def test_operations_of_a_scan_count_as_often_as_it_runs():
    def chain(x):
        return lax.scan(lambda y, _: (jnp.tanh(y @ y), None), x, length=7)[0] @ x

    traced = jax.jit(chain).trace(jax.ShapeDtypeStruct((5, 5), "float32"))
    assert product_flops(traced.jaxpr.jaxpr) == 8 * 2 * 5**3
