"""The memory of a step: what the compiler says, the least it can be, and the largest batch."""

import pytest

from jaxdp.common.config import with_value
from jaxdp.common.errors import ConfigError
from jaxdp.common.files import num_bytes
from jaxdp.estimate import compiled, memory
from jaxdp.step.setup import make_setup
from jaxdp.sync.methods import METHODS

VOCAB = 300  # Programs as in test_plans.py, so that they come from the cache.


def sizes(config, count=1, vocab=VOCAB):
    """What the compiler says of the step of a config."""
    return compiled.compile_step(config, vocab, compiled.local_machine(count)).sizes


def test_the_least_is_what_the_compiler_needs_for_arguments(config):
    for method in METHODS:
        config.sync.method = method
        setup = make_setup(config, VOCAB, 2)
        # The compiler leaves out arguments that a step doesn't read, and rounds sizes up.
        assert sizes(config, 2).arguments == pytest.approx(memory.least_bytes(setup), rel=0.02)


def test_sharded_optimizer_state_is_a_share_and_diloco_has_an_outer_one(config):
    def state(method):
        config.sync.method = method
        found = memory.state_shapes(make_setup(config, VOCAB, 4))
        return num_bytes(found.params), num_bytes((found.opt_state, found.outer))

    (parameters, whole), (_, sharded), (_, diloco) = map(
        state, ("gradient_mean", "sharded", "diloco")
    )
    # Slices are padded to equal lengths; there are counters besides the moments.
    assert sharded == pytest.approx(whole / 4, rel=0.01)
    assert diloco == whole + parameters


def test_parts_of_a_batch_and_chunks_of_a_loss_need_less(config):
    config.global_batch_size = 32
    whole = sizes(config, vocab=5000).temporaries  # Logits are the most of it.
    for key in ("grad_accum_steps", "loss_chunks"):
        assert sizes(with_value(config, key, 4), vocab=5000).temporaries < 0.6 * whole, key


def searched(function, room, first):
    """The result of a search, and the sizes that were compiled for it."""
    tried = []

    def needed(size):
        tried.append(size)
        return function(size)

    found, taken = memory.largest_batch(needed, room, first, least=function(0), most=10**6)
    assert taken == (function(found) if found else 0)
    return found, tried


@pytest.mark.parametrize("first", [1, 7, 250])
def test_a_line_through_two_sizes_finds_the_largest(first):
    found, tried = searched(lambda size: 1000 + 37 * size, 5000, first)
    assert found == 108  # 1000 + 37 * 108 = 4996
    assert len(tried) <= 3


@pytest.mark.parametrize("first", [1, 60, 500])
def test_a_bend_takes_a_few_more_tries(first):
    def needed(size):  # Small batches are cheaper, as what they need hides in other memory.
        return 1000 + 20 * size + max(0, 30 * (size - 50))

    found, tried = searched(needed, 10_000, first)
    assert needed(found) <= 10_000 < needed(found * 1.02 + 1)
    assert len(tried) <= memory.MAX_TRIES


def test_no_batch_fits_where_the_state_does_not():
    assert searched(lambda size: 1000 + 37 * size, 900, 8)[0] == 0
    assert searched(lambda size: 1000 + 37 * size, 1030, 8)[0] == 0
    assert searched(lambda size: 1000 + 37 * size, 1037, 8)[0] == 1


def test_memory_that_does_not_grow_ends_at_the_limit():
    assert searched(lambda size: 1000, 5000, 8)[0] == 10**6


def test_a_step_that_does_not_fit_is_refused_with_ways_out(config):
    config.global_batch_size, config.grad_accum_steps = 16, 2
    setup = make_setup(config, VOCAB, 2)
    memory.check_fits(setup, 10_000, 10_000)
    with pytest.raises(ConfigError) as raised:
        memory.check_fits(setup, 10_001, 10_000)
    assert str(raised.value) == (
        "global_batch_size=16 is too large: with 4 sequences at once the compiled step takes 10kB "
        "on a device, which has 10kB: raise grad_accum_steps (now 2), set model.remat=True, raise "
        "loss_chunks, or take a smaller model"
    )
