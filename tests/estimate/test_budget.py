"""What to train in a given time."""

import math

import jax
import pytest

from jaxdp.common.config import flatten
from jaxdp.common.errors import ConfigError
from jaxdp.estimate import budget
from jaxdp.estimate.budget import Budget, Size, cost, learning_rate, propose
from jaxdp.estimate.plan import plan

VOCAB = 4096


def budget_of(hours=1.0, devices=2, **texts):
    return Budget(hours, VOCAB, jax.local_devices()[:devices], **texts)


@pytest.mark.parametrize("rate", [1e11, 1e14])
def test_there_is_time_for_twenty_tokens_for_each_parameter(config, rate):
    """Embeddings not counted. Roughly: one more of three layers is a third more parameters."""
    found = propose(config, budget_of(), rate)
    assert 14 < found.tokens / found.core < 28
    assert found.parameters - found.core == VOCAB * found.config.model.embed_dim
    assert 32 <= found.config.model.embed_dim / found.config.model.num_layers <= 96
    used = found.config.num_train_steps * found.seconds
    assert budget.USED * 3600 - found.seconds <= used <= budget.USED * 3600


def test_of_more_time_model_and_text_get_equal_parts(config):
    one, four = (propose(config, budget_of(hours), 1e13) for hours in (1, 4))
    assert 1.5 < four.core / one.core < 2.7
    assert 1.5 < four.tokens / one.tokens < 2.7
    assert four.config.optimizer.learning_rate < one.config.optimizer.learning_rate
    assert four.config.global_batch_size > one.config.global_batch_size


def test_the_keys_make_the_proposed_config(config):
    config.optimizer.name, config.sync.method, config.sync.every = "muon", "diloco", 7
    config.model.update({"num_kv_heads": 1, "mlp_dim": 40})
    found = propose(config, budget_of(validation=[1000]), 1e12)
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(found.keys)
    assert flatten(changed) == flatten(found.config)
    assert "optimizer.learning_rate" not in found.keys  # The rule isn't Muon's.
    model = found.config.model
    assert model.num_heads % model.num_kv_heads == 0 < model.num_kv_heads <= model.num_heads / 2
    assert model.mlp_dim == pytest.approx(2.5 * model.embed_dim, abs=32)
    for steps in ("num_train_steps", "eval_every", "checkpoint.every"):
        assert found.keys[steps] % 7 == 0
    for name, value in found.keys.items():
        assert f"--config.{name}={value}" in found.flags.split()


def test_the_measured_speed_decides(config):
    """A small model is slower than was guessed, a large one slower still: it comes to an end."""
    tried = []

    def measure(config):
        tried.append(config.model.embed_dim)
        return config, 1e12 / config.model.embed_dim

    config.model.mlp_dim = config.model.embed_dim * 43 // 16  # As the quickstart's: 2.7 times.
    found = propose(config, budget_of(), 1e13, measure)
    assert found.rate == 1e12 / tried[-1]
    assert len(tried) <= budget.TRIALS and tried[-1] < tried[0]
    assert 10 < found.tokens / found.core < 40
    model = found.config.model
    as_given = budget.with_size(config, Size(model.num_layers, model.embed_dim)).model
    assert model.mlp_dim == as_given.mlp_dim  # Whatever sizes were timed before.


def test_evaluations_take_of_the_time(config):
    """Each is a forward pass, a third of a training step, over the validation split."""
    whole = propose(config, budget_of(), 1e12)
    tenth = whole.tokens // 10
    less = propose(config, budget_of(validation=[tenth], train=whole.tokens // 5), 1e12)
    assert less.tokens == pytest.approx(whole.tokens - budget.EVALUATIONS * tenth / 3, rel=0.01)
    assert less.passes == pytest.approx(4.33, abs=0.1)
    assert "more text would be better" in less.rows()["tokens"]


def test_evaluations_are_of_all_sets_and_as_long_as_they_may_be(config):
    """eval_max_batches limits each split; those that are shorter are read whole."""
    whole = propose(config, budget_of(), 1e12)
    tenth = whole.tokens // 10
    two = propose(config, budget_of(validation=[tenth, tenth]), 1e12)
    assert two.tokens == pytest.approx(whole.tokens - budget.EVALUATIONS * tenth / 1.5, rel=0.01)
    config.eval_max_batches = 20
    few = propose(config, budget_of(validation=[tenth, tenth, 10]), 1e12)
    batch = few.config.global_batch_size * config.seq_len
    assert 20 * batch < tenth
    less = budget.EVALUATIONS * (2 * 20 * batch + 10) / 3
    assert few.tokens == pytest.approx(whole.tokens - less, abs=2 * batch)


def test_a_plan_knows_the_sets(config, tmp_path):
    (tmp_path / "more.txt").write_text("1 is odd.\n" * 30_000)
    options = {"hours": 1e-2, "tflops": 1e-3, "memory_gib": 1e-6, "report": lambda line: None}
    without = plan(config, **options).proposal
    config.eval_sets = f"more={tmp_path / 'more.txt'}"
    assert plan(config, **options).proposal.tokens < without.tokens


@pytest.mark.parametrize("mlp_dim", [0, 1, 8, 90])
def test_an_mlp_stays_narrow(config, mlp_dim):
    """And isn't 4 times as wide as the model, which 0 means."""
    config.model.update({"embed_dim": 32, "mlp_dim": mlp_dim})
    for width in (32, 64, 96, 1024):
        found = budget.with_size(config, Size(2, width)).model.mlp_dim
        assert type(found) is int and (found > 0) == (mlp_dim > 0)
        assert found == pytest.approx(mlp_dim * width / 32, abs=32)


def test_learning_rates_are_those_of_the_paper():
    """1.79 N^-0.713 D^0.307, worked out by logarithms; and at most 0.01."""
    by_hand = 10 ** (math.log10(1.79) - 0.713 * 9 + 0.307 * 11)
    assert learning_rate(10**9, 10**11) == pytest.approx(by_hand)
    assert learning_rate(10**4, 10**6) == 0.01


def test_a_layer_adds_what_a_layer_added(config):
    """So that two sizes tell the cost of all."""
    costs = [cost(config, Size(layers, 64), VOCAB) for layers in (1, 2, 5)]
    for one, two, five in zip(*costs, strict=True):
        assert five == one + 4 * (two - one)


@pytest.mark.parametrize(
    ("hours", "changes", "message"),
    [
        (0, {}, "--hours=0 is no time"),
        (-1, {}, "--hours=-1 is no time"),
        (1, {"objective": "masked"}, "--hours has no rule for objective='masked'"),
        (1, {"init_from": "hf:x"}, "init_from='hf:x' have one"),
        (1e-9, {}, "--hours=1e-09 is time for 0 steps"),
    ],
)
def test_what_has_no_best_model_is_refused(config, hours, changes, message):
    config.update(changes)
    with pytest.raises(ConfigError, match=message):
        propose(config, budget_of(hours), 1e9)


def test_a_plan_is_of_the_proposal(config):
    """Its rate is given, so that nothing is timed."""
    found = plan(config, hours=1e-2, tflops=1e-3, memory_gib=1e-6, report=lambda line: None)
    assert found.proposal.rate == 1e9
    assert found.seconds == pytest.approx(found.proposal.seconds)
    assert found.proposal.flags in repr(found)
    assert found.proposal.passes > 0
