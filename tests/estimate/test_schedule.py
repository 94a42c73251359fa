"""What is read of a compiled program: bytes that kernels move, and what hides collectives."""

import pytest

from jaxdp.estimate import schedule
from jaxdp.estimate.schedule import Schedule, Transfer

# A loop of three products, a fusion that updates a slice of an array and reads a slice of another,
# and gradients that are summed while a product of the backward pass runs, and after it.
PROGRAM = """HloModule jit_step, is_scheduled=true

%body (s: f32[8,8]) -> f32[8,8] {
  %s = f32[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%s, %s), metadata={op_name="jit(step)/jvp(f)/dot_general"}
}

%updating (q: f32[100], u: f32[50], i: s32[]) -> f32[100] {
  %q = f32[100]{0} parameter(0)
  %u = f32[50]{0} parameter(1)
  %i = s32[] parameter(2)
  %part = f32[5]{0} dynamic-slice(%u, %i), dynamic_slice_sizes={5}
  ROOT %new = f32[100]{0} dynamic-update-slice(%q, %part, %i)
}

%backward (r: f32[8,8]) -> f32[8,8] {
  %r = f32[8,8]{1,0} parameter(0)
  ROOT %dot.2 = f32[8,8]{1,0} dot(%r, %r), metadata={op_name="step/transpose(jvp(f))/dot_general"}
}

ENTRY %main (x: f32[8,8], q0: f32[100], u0: f32[50], i0: s32[]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %q0 = f32[100]{0} parameter(1)
  %u0 = f32[50]{0} parameter(2)
  %i0 = s32[] parameter(3)
  %loop = f32[8,8]{1,0} while(%x), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %updated = f32[100]{0} fusion(%q0, %u0, %i0), kind=kLoop, calls=%updating
  %attention = (f32[8,8]{1,0}, u8[0]{0}) custom-call(%loop), \
custom_call_target="__cudnn$fmhaSoftmax"
  %first = ((f32[100]{0}), f32[100]{0}) all-reduce-start(%updated), to_apply=%add
  %gradient = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%backward
  %first-done = f32[100]{0} all-reduce-done(%first)
  %second = ((f32[8,8]{1,0}), f32[8,8]{1,0}) all-reduce-start(%gradient), to_apply=%add
  %second-done = f32[8,8]{1,0} all-reduce-done(%second)
  ROOT %third = f32[8,8]{1,0} all-reduce(%second-done), to_apply=%add
}
"""
MATRIX = 8 * 8 * 4


def test_bytes_by_group_of_kernels():
    assert Schedule(PROGRAM, 4).moved() == {
        "products": 3 * 3 * MATRIX + 2 * MATRIX,  # As a fusion reads an operand once.
        "attention": 2 * MATRIX,
        "collectives": 2 * (400 + 2 * MATRIX),
        "other": 20 + 20 + 4,  # The slice read, the slice written, the index.
    }


def test_what_runs_in_fusions_is_no_kernel():
    kernels = [x.instruction.name for x in Schedule(PROGRAM, 4).kernels()]
    assert kernels == [
        *("dot.1", "updated", "attention", "first", "gradient", "second", "third"),
    ]


def test_a_collective_is_covered_while_the_backward_pass_multiplies():
    transfers = Schedule(PROGRAM, 4).transfers()
    assert transfers == [
        Transfer("all-reduce", 400, True),
        Transfer("all-reduce", MATRIX, False),
        Transfer("all-reduce", MATRIX, False),
    ]
    assert schedule.covered_share(transfers) == pytest.approx(400 / (400 + 2 * MATRIX))
    assert schedule.covered_share([]) == 0


def test_a_collective_that_the_device_waits_for_is_not_covered():
    waiting = PROGRAM.replace(
        "all-reduce-start(%updated), to_apply=%add",
        'all-reduce-start(%updated), to_apply=%add, backend_config={"is_sync":true}',
    )
    transfers = Schedule(waiting, 4).transfers()
    assert [x.covered for x in transfers] == [False] * 3
    assert [x.bytes for x in transfers] == [400, MATRIX, MATRIX]
