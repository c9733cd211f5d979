"""What the TPU compiler makes of quantized matrices in a decode loop."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from benchmarks.rounds import HERE

# More layers than fit on the chip, where they would stay from step to step.
SCRIPT = """
from benchmarks.quantized_tpu import DECODINGS, gigabytes
print("GB:", gigabytes("2.7b", 8, "{dtype}", DECODINGS[0]))
"""
# Of eight layers and the embedding, which is the head too.
BFLOAT16_GB = 2 * (8 * 2560 * (10576 + 5120) + 50288 * 2560) / 1e9


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.55), ("int4", 0.32)])
def test_a_step_reads_the_bytes_and_no_copy(dtype, most, without_flags):
    command = [sys.executable, "-c", SCRIPT.format(dtype=dtype)]
    options = {"cwd": HERE.parent, "env": without_flags, "text": True}
    text = subprocess.run(command, **options, check=True, capture_output=True)
    found = float(text.stdout.split("GB:")[1])
    # Not all less than half: what stays on the chip between steps is not counted.
    assert 0.2 * BFLOAT16_GB < found < most * BFLOAT16_GB
