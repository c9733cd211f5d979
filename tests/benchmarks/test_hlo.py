"""What a program moves, read from its text: one written by hand, and one that XLA made."""

import re

import jax
import pytest
from jax import lax
from jax import numpy as jnp

from benchmarks.hlo import Module
from benchmarks.hlo import arrays

# As a TPU's scheduled program is written, shortened. S(1) is on the chip, the others in HBM.
TEXT = """HloModule jit_f, is_scheduled=true

%row (table: f32[100,128], i: s32[]) -> f32[1,128] {
  %table = f32[100,128]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,128]{1,0:T(1,128)S(1)} dynamic-slice(%table, %i, %zero), dynamic_slice_sizes={1,128}
}

%put (buffer: f32[100,128], row: f32[1,128], i: s32[]) -> f32[100,128] {
  %buffer = f32[100,128]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(2)
  %row = f32[1,128]{1,0:T(1,128)S(1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %same = f32[100,128]{1,0:T(8,128)} bitcast(%buffer)
  ROOT %update = f32[100,128]{1,0:T(8,128)} dynamic-update-slice(%same, %row, %i, %zero)
}

%rename (inner: f32[100,128]) -> f32[100,128] {
  %inner = f32[100,128]{1,0:T(8,128)} parameter(0)
  ROOT %same = f32[100,128]{1,0:T(8,128)} bitcast(%inner)
}

%double (weights: f32[100,128]) -> f32[100,128] {
  %weights = f32[100,128]{1,0:T(8,128)} parameter(0)
  %renamed = f32[100,128]{1,0:T(8,128)} fusion(%weights), kind=kLoop, calls=%rename
  ROOT %twice = f32[100,128]{1,0:T(8,128)S(1)} add(%renamed, %renamed)
}

%body (arg: (s32[], f32[100,128])) -> (s32[], f32[100,128]) {
  %arg = (s32[]{:T(128)}, f32[100,128]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)S(6)} get-tuple-element(%arg), index=0
  %x = f32[100,128]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %copy-start = (f32[100,128]{1,0:T(8,128)S(1)}, f32[100,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = f32[100,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %read = f32[1,128]{1,0:T(1,128)S(1)} fusion(%x, %n), kind=kLoop, calls=%row
  %write = f32[100,128]{1,0:T(8,128)} fusion(%x, %read, %n), kind=kLoop, calls=%put
  %doubled = f32[100,128]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%double
  %renamed = f32[100,128]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%rename
  %sum = f32[100,128]{1,0:T(8,128)} add(%write, %copy-done)
  ROOT %out = (s32[]{:T(128)}, f32[100,128]{1,0:T(8,128)}) tuple(%n, %sum)
}

%going (arg: (s32[], f32[100,128])) -> pred[] {
  %arg = (s32[]{:T(128)}, f32[100,128]{1,0:T(8,128)}) parameter(0)
  ROOT %yes = pred[]{:T(512)} constant(true)
}

ENTRY %main (x: (s32[], f32[100,128])) -> (s32[], f32[100,128]) {
  %x = (s32[]{:T(128)}, f32[100,128]{1,0:T(8,128)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[100,128]{1,0:T(8,128)}) while(%x), condition=%going, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501
ARRAY, ROW = 104 * 128 * 4, 128 * 4  # 100 rows fill 13 tiles of 8


@pytest.fixture
def module():
    return Module(TEXT)


def test_bytes_of_an_instruction_are_those_it_moves_to_and_from_hbm(module):
    (loop,) = module.loops()
    assert {i.name: n for n, i in module.traffic(loop.called[0])} == {
        "copy-start": 0,
        "copy-done": ARRAY,  # read, and written to the chip
        "read": ROW,  # of a table
        "write": ROW,  # in place
        "doubled": ARRAY,  # by another name
        "renamed": ARRAY,
        "sum": 2 * ARRAY,  # one summand is on the chip
    }


def test_a_loop_counts_as_often_as_it_runs(module):
    once = sum(n for n, _ in module.traffic("body"))
    assert sum(n for n, _ in module.traffic(module.entry)) == 5 * once


@pytest.mark.parametrize(
    ("type", "expected"),
    [
        ("f32[]", 4),
        ("pred[7]{0}", 7),
        ("bf16[2,3,5]{2,1,0}", 60),
        ("bf16[3,1792]{1,0:T(4,128)(2,1)}", 2 * 4 * 1792),
        ("f32[64,8]{0,1:T(8,128)}", 4 * 8 * 128),  # transposed: 64 is padded to 128
        ("s4[16]{0}", 8),
    ],
)
def test_bytes_of_a_type_are_padded_to_tiles(type, expected):
    assert [array.bytes for array in arrays(type)] == [expected]


@pytest.mark.parametrize(
    "instruction",
    [
        '%c = () custom-call(%x), custom_call_target="xla_ffi_python_cpu_callback"',
        "%s = (f32[], u32[], token[]) send(%x, %token), channel_id=1",
        "%h = f32[8]{0:T(128)S(5)} copy(%x)",
    ],
)
def test_a_visit_to_the_host_is_seen(module, instruction):
    assert module.host_transfers() == []
    text = re.sub(r"(%n = .*)", rf"\1\n  {instruction}", TEXT)
    assert Module(text).host_transfers() == [instruction[1]]


def test_a_program_of_this_platform_is_read():
    """A loop over 7 rows of a matrix that is read once."""
    rows, columns = 7, 1000

    def total(x):
        return lax.scan(lambda y, row: (y * 0.5 + row, None), jnp.zeros(columns), x)[0]

    lowered = jax.jit(total).lower(jax.ShapeDtypeStruct((rows, columns), "float32"))
    module = Module(lowered.compile().as_text())
    (loop,) = module.loops()
    assert module.trips(loop) == rows
    # A row and the sum in, the sum out; a copy of the sum is the compiler's to make.
    once = sum(n for n, _ in module.traffic(loop.called[0]))
    assert 3 * 4 * columns <= once <= 5 * 4 * columns + 100
    assert module.host_transfers() == []
