"""Predicts from a function's jaxpr how much memory it needs once XLA has compiled it.

Nothing is compiled or allocated. The function's operations are followed in the order in which they
were written, which is close to XLA's. Only values that XLA stores are counted; the others are
elementwise, and XLA recomputes them inside whatever reads them:

- Matrix products, reductions, gathers, loops and collectives are calls: their inputs and results
  are stored. A reduction over a product reads the product's factors, which are stored instead.
- Results of slow functions, such as tanh or exp, are stored if several operations read them.
  Results of cheap ones are recomputed.
- An elementwise operation overwrites a dead input, and results overwrite donated arguments.

Summing the residuals of `jax.vjp` doesn't work: a GELU has six, of which XLA stores two. The rules
come from XLA's CPU backend (jax 0.10.2 and 0.12.0.1) and were compared with it, not with GPUs.
Float32 came within 14%; bfloat16 up to 28% too low, because CPUs store some of it in float32.
Scanned layers with remat came up to 17% too low, and Muon on tiny batches a third: XLA packs these
values with gaps, or computes them in another order.
"""

import collections
import dataclasses
import math
from typing import Any

from jax.extend.core import Jaxpr, Literal, Var

CALLS: tuple[str, ...] = (
    *("dot_general", "conv_", "reduce", "arg", "cum", "sort", "top_k", "gather", "scatter"),
    *("scan", "while", "cond", "random_bits", "threefry", "concatenate", "dynamic_update_slice"),
    *("psum", "pmax", "pmin", "all_", "ppermute", "custom_call", "ffi_call"),
)
LOOPS = ("scan", "while", "cond")
SLOW: tuple[str, ...] = (
    *("exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erf_inv", "pow"),
    *("rsqrt", "sqrt", "cbrt", "sin", "cos", "div"),
)
VIEWS = ("reshape", "squeeze", "expand_dims", "copy")  # They share the memory of their input.
IN_PLACE = ("scatter", "dynamic_update_slice")  # Calls that overwrite a dead operand.


@dataclasses.dataclass(eq=False)
class Value:
    """An array of a program.

    Attributes:
      size: its bytes.
      maker: the operation that computes it; None for arguments and constants.
      users: the operations that read it.
      stored: whether it is ever in memory.
    """

    size: int
    maker: "Op | None" = None
    users: "list[Op]" = dataclasses.field(default_factory=list)
    stored: bool = False


@dataclasses.dataclass(eq=False)
class Op:
    """An operation of a program.

    Attributes:
      name: the name of its primitive.
      inputs: its operands, without literals.
      outputs: its results.
      scratch: bytes that it needs while it runs, beyond inputs and outputs.
      sums_rows: whether it is a matrix product that sums over rows of its first operand.
      carried: (initial, final) value of each carry, if it is a loop.
    """

    name: str
    inputs: list[Value]
    outputs: list[Value] = dataclasses.field(default_factory=list)
    scratch: int = 0
    sums_rows: bool = False
    carried: "list[tuple[Value | None, Value]]" = dataclasses.field(default_factory=list)

    @property
    def is_call(self) -> bool:
        """Whether XLA runs it by itself, fused with others only by this module's rules."""
        return self.name.startswith(CALLS) and self.name != "reduce_precision"


def peak_bytes(jaxpr: Jaxpr, loop_args: int | None = None) -> int:
    """Returns the peak memory in bytes, beyond arguments and results.

    Args:
      jaxpr: the function's jaxpr; its results overwrite donated arguments, or are small.
      loop_args: for the body of a loop: this many arguments belong to the loop and cost nothing;
        the others are slices, copied in each iteration, and results are kept until its end.
    """
    args = [Value(0) for _ in jaxpr.invars]
    if loop_args is not None:
        for arg, var in list(zip(args, jaxpr.invars, strict=True))[loop_args:]:
            arg.size = _size(var.aval)
    ops: list[Op] = []
    results = [x for x in _inline(jaxpr, args, ops) if x is not None]
    ops = _needed(ops, results)
    broadcasts = _choose_stored(ops, args, results)
    if loop_args is None:
        for result in results:
            _source(result).size = 0
    return _walk(ops, {_source(x) for x in results}, broadcasts)


def _size(aval: Any) -> int:
    # The dtype of PRNG keys may have no itemsize; a key is two words of 4 bytes.
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)


def _inline(jaxpr: Jaxpr, args: Any, ops: list[Op]) -> list[Value | None]:
    """Appends a jaxpr's operations to `ops`, inner functions inlined; returns its results."""
    values: dict[Var, Any] = dict(zip(jaxpr.invars, args, strict=True))
    values |= {var: Value(0) for var in jaxpr.constvars}
    slices: dict[tuple, list[Any]] = {}

    def read(var) -> Value | None:
        return None if isinstance(var, Literal) else values[var]

    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [read(var) for var in eqn.invars]
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if inner is not None and name not in LOOPS:
            outputs = _inline(_open(inner), inputs, ops)
        elif name == "optimization_barrier":
            outputs = inputs
        else:
            op = Op(name, [x for x in inputs if x is not None])
            op.outputs = [Value(_size(var.aval), op) for var in eqn.outvars]
            outputs = list(op.outputs)
            _look_inside(eqn, op, inputs)
            ops.append(op)
        if name == "slice":  # XLA takes the same slice only once, also in the backward pass.
            same = (inputs[0], eqn.params["start_indices"], eqn.params["limit_indices"])
            outputs = slices.setdefault(same, outputs)
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _open(jaxpr: Any) -> Jaxpr:
    """Returns the Jaxpr inside a ClosedJaxpr; JAX versions differ in which of them they give."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _same_rank(outside: Any, inside: Any) -> int:
    return sum(x.aval.ndim == y.aval.ndim for x, y in zip(outside, inside, strict=True))


def _look_inside(eqn: Any, op: Op, inputs: list[Value | None]) -> None:
    """Sets the attributes of `op` that depend on the parameters of its primitive."""
    if op.name == "scan":
        body = _open(eqn.params["jaxpr"])
        # Sliced and stacked arrays have one more axis outside the loop than inside.
        fixed = _same_rank(eqn.invars, body.invars)
        carry = _same_rank(eqn.outvars, body.outvars)
        op.scratch = peak_bytes(body, loop_args=fixed)
        op.carried = list(zip(inputs[fixed - carry : fixed], op.outputs[:carry], strict=True))
    elif op.name == "while":
        body = _open(eqn.params["body_jaxpr"])
        op.scratch = peak_bytes(body, loop_args=len(body.invars))
        op.carried = list(zip(inputs[-len(op.outputs) :], op.outputs, strict=True))
    elif op.name == "dynamic_update_slice" and op.inputs[0].maker is None:
        op.outputs[0].size = 0  # Overwrites the carry of a loop.
    elif op.name == "random_bits":
        # Threefry makes two words of each count. XLA stores both, not their xor, and recomputes
        # dropout masks from them in the backward pass.
        op.outputs[0].size *= 2
    elif op.name == "dot_general":
        (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
        free = set(range(eqn.invars[0].aval.ndim)) - {*contracted, *batch}
        op.sums_rows = len(free) > 1 and min(contracted) < max(free)


def _needed(ops: list[Op], results: list[Value]) -> list[Op]:
    """Removes dead operations; sets `users` from the others."""
    wanted, kept = set(results), []
    for op in reversed(ops):
        if wanted.intersection(op.outputs):
            wanted.update(op.inputs)
            kept.append(op)
    for op in reversed(kept):
        for value in op.inputs:
            value.users.append(op)
    return kept[::-1]


def _source(value: Value) -> Value:
    """Returns the value whose memory a view shares, or a value that is no view itself."""
    while value.maker and value.maker.name in VIEWS:
        value = value.maker.inputs[0]
    return value


def _choose_stored(
    ops: list[Op], args: list[Value], results: list[Value]
) -> dict[tuple[Value, int], Op]:
    """Sets `stored`; returns {(value, bytes of its broadcast copy in memory): last reader}."""
    broadcasts: dict[tuple[Value, int], Op] = {}
    for value in (*args, *results):
        _source(value).stored = True
    for op in ops:
        if op.is_call:
            for value in op.outputs:
                value.stored = True
            if op.sums_rows:
                op.scratch = _transposed(op).size
            _carry_in_place(op)
            for value in map(_source, op.inputs):
                factors = _factors(op, value)
                for factor in factors or [value]:
                    factor.stored = True
                for small in _multiplied(factors):
                    small.stored = True
                    broadcasts[small, value.size] = op
        elif op.name in SLOW:
            for value in op.outputs:
                value.stored |= len(value.users) > 1
    _store_wide(ops)
    return broadcasts


def _store_wide(ops: list[Op]) -> None:
    """Stores values with several readers that depend on more than two arrays of their size.

    An example is the gradient of the residual stream: otherwise each layer's addend would be.
    """
    known: dict[Value, set[Value]] = {}
    for op in ops:
        for value in op.outputs:
            kept = [x for x in _stored_under(value, known) if x.size >= value.size]
            if not value.stored and len(value.users) > 1 and len(kept) > 2:
                value.stored = True
                known.clear()


def _carry_in_place(op: Op) -> None:
    """Counts a carry once: its final value overwrites the initial one if nothing else reads it."""
    for first, final in op.carried:
        if first is not None and first.users == [op]:
            if _source(first).maker is None:  # A donated argument.
                final.size = 0
            op.scratch -= final.size


def _transposed(op: Op) -> Value:
    """Returns the operand that XLA copies for a product that sums over rows: its second one.

    Where the result is transposed, as a weight's gradient is, XLA swaps the operands instead.
    """
    value, swapped = op.outputs[0], False
    while len(value.users) == 1 and value.users[0].name in (*VIEWS, "transpose"):
        swapped ^= value.users[0].name == "transpose"
        [value] = value.users[0].outputs
    return op.inputs[0 if swapped else -1]


def _factors(op: Op, value: Value) -> list[Value]:
    """Returns the factors of a product that only a reduction reads; none for other values."""
    maker = value.maker
    if not op.name.startswith("reduce") or not maker or len(value.users) > 1:
        return []
    names = ("mul", "square", "integer_pow")
    return [_source(x) for x in maker.inputs] if maker.name in names else []


def _multiplied(factors: list[Value]) -> set[Value]:
    """Returns the smaller values that a reduction's factors are multiplied with by broadcasting.

    In the backward passes of norms and softmax, XLA's CPU library needs buffers of one size for the
    factors of a reduction and all that they are multiplied with: even for 1 / sum, one number per
    row. (For batches of less than about 16, it may not need it for softmax.)
    """
    size = max((x.size for x in factors), default=0)
    products = [op for x in factors for op in x.users if op.name == "mul" and x.size == size]
    others = {_source(x) for op in products for x in op.inputs} | set(factors)
    return {x for x in others if x.size < size}


def _walk(ops: list[Op], results: set[Value], broadcasts: dict[tuple[Value, int], Op]) -> int:
    """Follows memory use through all operations; returns the peak in bytes."""
    steps = [op for op in ops if any(x.stored for x in op.outputs) and op.name not in VIEWS]
    number = {op: i for i, op in enumerate(steps)}
    last: dict[Value, int] = {}
    made: dict[Value, int] = {}
    reads: dict[Value, set[Value]] = {}
    for i, op in enumerate(steps):
        for value in op.inputs:
            for stored in _stored_under(value, reads):
                last[stored] = i
                made.setdefault(stored, i)  # A slice, made when it is first read.
        made |= {value: i for value in op.outputs if value.stored}
    for (small, size), op in broadcasts.items():
        if op in number and made.get(small, 0) < number[op]:
            copy = Value(size)
            made[copy], last[copy] = made.get(small, 0), number[op]

    starts: dict[int, int] = collections.defaultdict(int)
    ends: dict[int, int] = collections.defaultdict(int)
    for value, i in made.items():
        starts[i] += value.size
    for value in made.keys() - results:
        ends[last.get(value, made[value])] += value.size
    now = peak = 0
    for i, op in enumerate(steps):
        in_place = not op.is_call or op.name.startswith(IN_PLACE)
        now += starts[i] - ends[i]
        peak = max(peak, now + op.scratch + (0 if in_place else ends[i]))
    return peak


def _stored_under(value: Value, known: dict[Value, set[Value]]) -> set[Value]:
    """Returns the stored values from which a value is recomputed where it is read."""
    value = _source(value)
    if value.stored:
        return {value}
    if value not in known:
        inputs = value.maker.inputs if value.maker else []
        known[value] = set().union(*(_stored_under(x, known) for x in inputs))
    return known[value]
