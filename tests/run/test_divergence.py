"""Skipped updates, spikes, and going back."""

import itertools
import json
import math
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdp.common.errors import RunError
from jaxdp.model.matrices import is_hidden
from jaxdp.run import divergence, loop, report
from jaxdp.run.divergence import WINDOW, Divergence, Trouble, by_layer
from jaxdp.run.rollback import roll_back
from jaxdp.step.objective import Objective
from jaxdp.step.setup import make_setup
from jaxdp.sync.fingerprints import ReplicaCheck
from support.runs import after, checkpoints_of, figures, train_in_parts
from support.steps import VOCAB, batches, start

POISON = 7  # A token after which the model's output is not finite.


def poisoned(apply_fn):
    def apply(variables, inputs, **options):
        logits = apply_fn(variables, inputs, **options)
        return logits * jnp.where((inputs == POISON).any(), jnp.nan, 1.0)

    return apply


def run(config, devices, given):
    """The state after these batches, and the figures, with a model that can't bear POISON."""
    config.num_train_steps = max(len(given), config.optimizer.warmup_steps + 1)
    program, replicas, state = start(config, devices)
    state = state.replace(apply_fn=poisoned(state.apply_fn))
    found, waiting = [], iter(given)
    while len(found) < len(given):
        part = list(itertools.islice(waiting, program.round_length(len(found))))
        state, metrics = program(len(found), state, replicas.shard_steps(part))
        metrics = jax.device_get(metrics)
        found += [{k: v[i] for k, v in metrics.items()} for i in range(len(part))]
    ReplicaCheck(replicas)({"params": state.params}, 0)
    return state, found


def harmless(count):
    given = list(batches(count))
    for batch in given:
        batch["inputs"] = np.where(batch["inputs"] == POISON, 0, batch["inputs"])
    return given


@pytest.mark.parametrize("method", ["gradient_mean", "sharded", "fixed_order"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_skipped_batch_is_as_if_it_had_not_been(config, method, optimizer):
    """Bit by bit, on all devices, though only one of them saw what was wrong."""
    config.sync.method, config.optimizer.name = method, optimizer
    config.optimizer.update({"schedule": "constant", "warmup_steps": 0})
    given = harmless(4)
    bad = given[1] | {"inputs": given[1]["inputs"].copy()}
    bad["inputs"][5, 3] = POISON
    with_it, found = run(config, 4, [given[0], bad, *given[2:]])
    without, _ = run(config, 4, [given[0], *given[2:]])
    assert [f["skipped"] > 0 for f in found] == [False, True, False, False]
    assert not math.isfinite(found[1]["loss"])
    assert (with_it.step, without.step) == (4, 3)
    for a, b in zip(*(jax.tree.leaves(s.params) for s in (with_it, without)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_schedule_goes_on_over_a_skipped_update(config):
    """Else the learning rate would lag behind for ever, and the metrics would tell another one."""
    config.optimizer.update({"name": "sgd", "b1": 0.0, "weight_decay": 0.0, "warmup_steps": 3})
    given = harmless(3)
    given[1]["inputs"][0, 0] = POISON
    before, found = run(config, 2, given[:2])
    after, found = run(config, 2, given)
    change = jax.tree.map(jnp.subtract, after.params, before.params)
    norm = math.sqrt(sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(change)))
    clipped = min(found[2]["grad_norm"], config.optimizer.clip_norm)
    np.testing.assert_allclose(norm, found[2]["learning_rate"] * clipped, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "optimizer"), [("parameter_mean", "adamw"), ("diloco", "adamw"), ("diloco", "muon")]
)
def test_replicas_that_train_alone_skip_alone_and_agree(config, method, optimizer):
    config.sync.method, config.optimizer.name = method, optimizer
    given = harmless(config.sync.every * 2)
    given[1]["inputs"][5, 3] = POISON
    state, found = run(config, 4, given)
    assert [f["skipped"] for f in found] == [0, 1, 0, 0, 0, 0]
    for x in jax.tree.leaves((state.params, state.opt_state)):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("dtype", ["float32", "int1"])
def test_a_round_that_all_replicas_skip_updates_no_embedding(config, dtype):
    """DiLoCo with Muon, which updates all but hidden matrices at the end of a round.

    What rounding had lost of their gradients is still to be sent, too.
    """
    config.sync.update({"method": "diloco", "every": 2, "dtype": dtype})
    config.optimizer.update({"name": "muon", "schedule": "constant", "warmup_steps": 0})
    given = harmless(4)
    for batch in given[2:]:
        batch["inputs"][:, 3] = POISON
    before, _ = run(config, 4, given[:2])
    after, found = run(config, 4, given)
    assert [f["skipped"] for f in found] == [0, 0, 4, 4]
    moments = [optax.tree.get(s.opt_state, "nu") for s in (after, before)]
    lost = [list(s.residual.values()) for s in (after, before)]
    assert len(lost[0]) == (0 if dtype == "float32" else 2)
    for now, then in [(after.params, before.params), moments, *zip(*lost, strict=True)]:
        hidden = jax.tree.leaves(is_hidden(now))
        for a, b, one in zip(*map(jax.tree.leaves, (now, then)), hidden, strict=True):
            assert one or np.asarray(a).tobytes() == np.asarray(b).tobytes()


def losses(judge, values, first=0):
    for step, loss in enumerate(values, first):
        judge.add(step + 1, [loss], [0.0])


def test_a_spike_is_measured_against_the_losses_before(config):
    config.divergence.spike_threshold = 8.0
    noise = np.random.default_rng(0).normal(3, 0.1, 300)
    judge = Divergence(config)
    losses(judge, noise)
    assert judge.trouble is None
    losses(judge, [4.5], first=300)
    assert judge.trouble.step == judge.trouble.end == 301
    assert "the loss 4.5000 of step 301" in judge.trouble.reason
    judge.roll_back()
    # The level that it went back to may be far higher; it is learnt anew.
    losses(judge, noise[: WINDOW - 1] + 5, first=301)
    assert judge.trouble is None and judge.rollbacks == 1


@pytest.mark.parametrize("values", [[2.0] * 99 + [50.0], np.linspace(9, 2, 300)])
def test_what_is_no_spike(config, values):
    config.divergence.spike_threshold = 3.0
    judge = Divergence(config)
    losses(judge, values)
    assert judge.trouble is None


def test_only_bad_steps_in_a_row_count(config):
    config.divergence.max_bad_steps = 3
    judge = Divergence(config)
    judge.add(4, [math.nan, math.nan, 3.0, math.nan], [1.0, 1.0, 0.0, 4.0])
    assert (judge.skipped, judge.in_a_row, judge.trouble) == (3, 1, None)
    again = Divergence(config)
    again.load(json.loads(json.dumps(judge.to_json())))
    for one in (judge, again):
        one.add(7, [math.nan] * 3, [1.0] * 3)
        # The third in a row is step 6; the round ends at 7.
        assert (one.trouble.step, one.trouble.end) == (6, 7)
        assert "no finite loss or gradient in 3 steps" in one.trouble.reason
    assert judge.to_json() == again.to_json()


def test_layers_are_listed_in_the_order_of_the_model():
    norms = {"embed": np.float32(1), "head": np.float32(2), "layers": np.arange(11.0)}
    rows = by_layer({"parameters": norms, "gradient": norms})
    assert list(rows) == ["embed", *(f"layer_{i}" for i in range(11)), "head"]
    assert rows["layer_10"] == {"parameters": 10.0, "gradient": 10.0}


@pytest.fixture
def diverging(config, tmp_path, monkeypatch):
    """A run whose model can't bear a letter that stands four times in its text."""
    text = (tmp_path / "text").with_suffix(".txt")
    words = [f"{i} is {'odd' if i % 2 else 'even'}.\n" for i in range(1000)]
    for i in (150, 350, 351, 750):
        words[i] = "#" + words[i]
    text.write_text("".join(words))
    config.data.path = str(text)
    config.update({"num_train_steps": 100, "eval_max_batches": 4})
    config.eval_every = config.checkpoint.every = 10
    config.model.dropout = 0.1
    gradient_sums = Objective.gradient_sums

    def poisoned(self, state, batch, accumulate):
        (loss, weight), sums = gradient_sums(self, state, batch, accumulate)
        # The letters are numbered in their order; "\n", " ", "#", ".", ...
        factor = jnp.where((batch["inputs"] == 2).any(), jnp.nan, 1.0)
        loss, sums = jax.tree.map(lambda x: x * factor, (loss, sums))
        return (loss, weight), sums

    monkeypatch.setattr(Objective, "gradient_sums", poisoned)
    return config


@pytest.mark.parametrize("method", ["gradient_mean", "sharded"])
def test_going_back_leaves_the_same_run_however_it_is_interrupted(diverging, tmp_path, method):
    config = diverging
    config.sync.method = method
    config.divergence.update({"max_bad_steps": 1, "max_rollbacks": 9})
    devices = jax.local_devices()[:4]
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    assert whole.finished
    records = figures(tmp_path / "whole")
    assert [r["step"] for r in records] == list(range(1, 101))
    assert sum(r["train/loss"] is None for r in records) == records[-1]["train/skipped"] > 1
    parts, interruptions = train_in_parts(config, tmp_path / "parts", devices, times=65)
    assert interruptions == 3
    assert records == figures(tmp_path / "parts")
    for a, b in zip(*(jax.tree.leaves(r.state.params) for r in (whole, parts)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_change_of_the_interval_costs_no_good_checkpoint(config, tmp_path, monkeypatch, capsys):
    """An interruption's checkpoint isn't gone back to, and the one that was due is kept."""
    devices, judge = jax.local_devices()[:1], Divergence.add
    config.update({"num_train_steps": 8, "eval_every": 100})
    config.checkpoint.update({"every": 4, "keep_last": 1})
    config.divergence.max_bad_steps = 1
    loop.train(config, tmp_path, devices=devices)
    config.update({"num_train_steps": 14})
    config.checkpoint.every = 7
    stopped = loop.train(config, tmp_path, devices=devices, stop_requested=after(5))
    assert 8 < stopped.step < 12 and set(checkpoints_of(tmp_path)) == {8, stopped.step}

    def spoiled(self, end, losses, skipped):
        judge(self, end, losses, [float(self.rollbacks == 0 and end == 12)] * len(losses))

    monkeypatch.setattr(Divergence, "add", spoiled)
    assert loop.train(config, tmp_path, devices=devices).finished
    assert "Back to the parameters of step 8;" in capsys.readouterr().out


def test_going_back_holds_one_state(config):
    """The present one is gone when the checkpoint is read: two take more memory than training."""
    _, _, state = start(config, 2)
    leaves = jax.tree.leaves(state)
    run = Mock(config=config, setup=make_setup(config, VOCAB, 2), unevaluated=False)
    run.judge.rollbacks, run.judge.trouble = 0, Trouble(4, 6, "why")

    def restore(like, fit):
        assert leaves and all(x.is_deleted() for x in leaves)
        assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(like))
        return 3, {}, "restored"

    run.checkpoints.restore = restore
    assert roll_back(run, state)[0] == 6
    run.program.at_step.assert_called_once_with("restored", 6)


# The first bad step, number 11, is in the midst of a round of DiLoCo.
@pytest.mark.parametrize(("method", "rollbacks"), [("gradient_mean", 1), ("diloco", 0)])
def test_a_run_that_goes_back_too_often_ends_with_a_diagnosis(
    diverging, tmp_path, method, rollbacks, capsys
):
    config = diverging
    config.sync.update({"method": method, "every": 10})
    config.model.num_layers = 2
    config.divergence.update({"max_bad_steps": 1, "max_rollbacks": rollbacks})
    with pytest.raises(RunError, match=f"in a step, after {rollbacks} roll-backs") as raised:
        loop.train(config, tmp_path / "run", devices=jax.local_devices()[:4])
    found = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    bad = [r["step"] for r in figures(tmp_path / "run") if r["train/loss"] is None]
    assert found["step"] in bad and found["loss"] == "NaN"
    assert f"diverged at step {found['step']}: " in str(raised.value)
    assert f"step {bad[-1]}: loss or gradient is not finite" in capsys.readouterr().out
    text = (tmp_path / "text.txt").read_text()
    begins = found["sequences_begin_at_tokens"]
    assert len(begins) == 8
    # One of the sequences that it names holds the letter.
    assert any("#" in text[begin : begin + config.seq_len] for begin in begins)
    assert list(found["norms"]) == ["embed", "position_embed", "layer_0", "layer_1", "final_norm"]
    assert math.isfinite(found["norms"]["layer_1"]["parameters"])
    assert found["norms"]["layer_1"]["gradient"] == "NaN"


def test_a_diagnosis_that_can_not_be_written_is_shown(config, tmp_path, monkeypatch):
    (tmp_path / "diagnosis.json").mkdir()
    monkeypatch.setattr(divergence, "diagnose", lambda *_: {"norms": {}})
    monkeypatch.setattr(report, "diagnosis", dict)
    run = Mock(config=config, workdir=tmp_path)
    run.judge.rollbacks, run.judge.trouble = config.divergence.max_rollbacks, Trouble(5, 6, "why")
    with pytest.raises(RunError, match=r"at step 5: why.*; the table above \(.*json can't be wri"):
        roll_back(run, None)
    assert run.display.table.called
