"""The reader of compiled programs."""

import pytest

from jaxdp.common import hlo

PROGRAM = """HloModule jit_f, is_scheduled=true

%inside (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %tanh.1 = f32[4]{0} tanh(%p), metadata={op_name="jit(f)/tanh"}
}

ENTRY %main.3 (a: f32[4], b: bf16[2]) -> (f32[4], bf16[2]) {
  %a = f32[4]{0} parameter(0), metadata={op_name="x"}
  %b = bf16[2]{0} parameter(1)
  %fusion.1 = f32[4]{0} fusion(%a), kind=kLoop, calls=%inside, metadata={op_name="jit(f)/tanh"}
  %while.2 = (f32[4]{0}, /*index=1*/bf16[2]{0}) while(%fusion.1), condition=%c, body=%inside, \
backend_config={"known_trip_count":{"n":"7"}}
  ROOT %tuple = (f32[4]{0}, bf16[2]{0}) tuple(%fusion.1, /*index=1*/%b)
}
"""


def test_a_program_is_read():
    computations, entry = hlo.parse(PROGRAM)
    assert entry == "main.3"
    assert [x.name for x in computations["inside"]] == ["p", "tanh.1"]
    a, b, fusion, loop, root = computations[entry]
    assert (a.kind, b.shape, a.operands) == ("parameter", "bf16[2]{0}", ())
    assert (fusion.called, fusion.op_name, fusion.trips) == (["inside"], "jit(f)/tanh", 1)
    assert (loop.called, loop.trips) == (["inside"], 7)
    assert (root.operands, root.is_root, loop.is_root) == (("fusion.1", "b"), True, False)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[3,2]{1,0:T(8,128)}", 12),
        ("pred[5]", 5),
        ("f8e4m3fn[10]", 10),
        ("s4[7]", 3),
        ("((f32[2]{0}), /*index=1*/u8[3])", 11),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert hlo.num_bytes(shape) == size
