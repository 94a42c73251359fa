import functools

import jax
import jax.numpy as jnp

from jaxdp.estimate import liveness, memory


def peak(function, *shapes):
    return liveness.peak_bytes(jax.make_jaxpr(function)(*shapes).jaxpr)


def test_elementwise_chains_need_no_memory_but_for_slow_functions_that_are_read_twice():
    x = memory.abstract_array((1000,))
    assert peak(lambda x: x * 2 + 1, x) == 0
    assert peak(lambda x: jnp.tanh(x) * 2, x) == 0
    assert peak(lambda x: (jnp.tanh(x) * 2, jnp.tanh(x) + 1), x) == 0

    def twice(x):
        y = jnp.tanh(x)
        return y * 2, y + x

    assert peak(twice, x) == 4000


def test_a_chain_of_products_needs_two_of_them_at_a_time():
    x = memory.abstract_array((100, 100))
    for length in (3, 6):
        assert peak(lambda x, n=length: functools.reduce(jnp.matmul, [x] * n).sum(), x) == 80_000


def test_dead_code_needs_no_memory():
    assert peak(lambda x: (x @ x, x + 1)[1], memory.abstract_array((100, 100))) == 0


def test_a_loop_needs_what_one_iteration_needs():
    def loop(x, length):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ x) @ x, None), x, length=length)[0]

    x = memory.abstract_array((100, 100))
    once, often = (peak(functools.partial(loop, length=n), x) for n in (1, 50))
    assert 0 < once == often
