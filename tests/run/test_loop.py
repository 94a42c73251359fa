"""Whole runs, in this process."""

import jax
import numpy as np
import pytest

from jaxdp.common.errors import ConfigError, RunError
from jaxdp.run import evaluation, loop, session
from jaxdp.run.early_stopping import EarlyStopping
from jaxdp.sync.methods import METHODS
from jaxdp.workdir import integrity
from jaxdp.workdir.checkpoints import Checkpoints
from jaxdp.workdir.generation import generate
from jaxdp.workdir.metrics import read_jsonl
from support.runs import (
    after,
    assert_close_losses,
    checkpoints_of,
    contents,
    figures,
    params_of,
)
from support.steps import corrupt, flip_lowest_bit


@pytest.mark.parametrize("optimizer", ["lion", "sgd", "muon"])
def test_resuming_is_not_stopping(config, tmp_path, optimizer):
    """Bit by bit, with dropout, wherever the run was interrupted."""
    config.optimizer.name = optimizer
    config.model.dropout = 0.2
    devices = jax.local_devices()[:2]
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    stopped = loop.train(config, tmp_path / "parts", devices=devices, stop_requested=after(6))
    assert not stopped.finished and 0 < stopped.step < 6
    parts = loop.train(config, tmp_path / "parts", devices=devices)
    assert parts.finished
    for a, b in zip(params_of(whole), params_of(parts), strict=True):
        assert a.tobytes() == b.tobytes()
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_resuming_on_other_devices_is_the_same_run(config, tmp_path):
    config.model.dropout = 0.2
    loop.train(config, tmp_path / "whole", devices=jax.local_devices()[:1])
    loop.train(
        config,
        tmp_path / "parts",
        devices=jax.local_devices()[:4],
        stop_requested=after(6),
    )
    loop.train(config, tmp_path / "parts", devices=jax.local_devices()[:8])
    assert_close_losses(figures(tmp_path / "whole"), figures(tmp_path / "parts"))


DEATHS = {
    "in the evaluation": (session, "evaluate_all"),
    "before its loss is recorded": (Checkpoints, "evaluated"),
    "after it": (EarlyStopping, "add"),
}


@pytest.mark.parametrize("moment", DEATHS)
def test_a_run_that_dies_at_its_evaluations_loses_nothing(config, tmp_path, monkeypatch, moment):
    """Each step is saved before it is evaluated; what is missing is made up for at the start."""
    config.update({"num_train_steps": 12, "log_every": 2, "eval_every": 3})
    config.checkpoint.update({"every": 3, "keep_last": 1})
    config.optimizer.update({"learning_rate": 3.0, "warmup_steps": 11})  # Worse and worse.
    devices = jax.local_devices()[:1]
    loop.train(config, tmp_path / "whole", devices=devices)
    (where, name), calls = DEATHS[moment], iter(range(100))
    call = getattr(where, name)

    def dies(*args):
        if next(calls) in (0, 3, 5):
            raise KeyboardInterrupt
        return call(*args)

    monkeypatch.setattr(where, name, dies)
    starts = [0]
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path / "parts", devices=devices)
        starts.append(max(checkpoints_of(tmp_path / "parts")))
    result = loop.train(config, tmp_path / "parts", devices=devices)
    assert starts == [0, 3, 9, 12]
    assert result.finished and result.step == 12
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    left = checkpoints_of(tmp_path / "parts")
    assert left == checkpoints_of(tmp_path / "whole") and set(left) == {3, 12}  # Best and newest.


@pytest.mark.parametrize(("times", "step"), [(7, 3), (9, 3), (18, 6)])
def test_a_run_that_is_asked_to_stop_evaluates_when_it_resumes(config, tmp_path, times, step):
    """Before and in an evaluation, in the middle and after the last step; each has 3 batches."""
    config.eval_max_batches = 3
    devices = jax.local_devices()[:2]
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    stopped = loop.train(config, tmp_path / "parts", devices=devices, stop_requested=after(times))
    assert (stopped.step, stopped.finished, stopped.evaluations) == (step, False, {})
    assert "eval/loss" not in figures(tmp_path / "parts")[-1]
    parts = loop.train(config, tmp_path / "parts", devices=devices)
    assert parts.finished and parts.evaluations == whole.evaluations
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    assert checkpoints_of(tmp_path / "whole") == checkpoints_of(tmp_path / "parts")
    assert loop.train(config, tmp_path / "parts", devices=devices).evaluations == {}


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_run_that_is_shortened_to_where_it_was_stopped_is_evaluated(config, tmp_path, log_every):
    """As there is always an evaluation at the end; the line of that step isn't written twice."""
    config.update({"num_train_steps": 40, "eval_every": 20, "log_every": log_every})
    devices = jax.local_devices()[:1]
    stopped = loop.train(config, tmp_path / "run", devices=devices, stop_requested=after(5))
    assert 1 < stopped.step < 20 and not stopped.evaluations
    config.num_train_steps = stopped.step
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    result = loop.train(config, tmp_path / "run", devices=devices)
    assert result.finished and result.step == stopped.step
    records = figures(tmp_path / "run")
    assert len(records) == len({r["step"] for r in records})
    assert records[-1]["step"] == whole.step and ("train/loss" in records[-1]) == (log_every == 1)
    assert records[-1]["eval/loss"] == result.evaluations[""].loss
    (loss, tokens), _ = checkpoints_of(tmp_path / "run")[result.step]
    assert loss == result.evaluations[""].loss
    assert tokens == result.evaluations[""].tokens
    assert loop.train(config, tmp_path / "run", devices=devices).evaluations == {}


COMPRESSED = {"gradient_mean": "int4", "sharded": "int8", "diloco": "int1"}


@pytest.mark.parametrize("method", [*METHODS, "diloco with muon"])
def test_resuming_is_not_stopping_however_replicas_agree(config, tmp_path, method):
    """Bit by bit: parameters, each device's moments, outer momentum, what rounding has lost."""
    method, with_muon, _ = method.partition(" with muon")
    config.optimizer.name = "muon" if with_muon else "adamw"
    islands = 2 if METHODS[method].has_islands else 0
    config.sync.update({"method": method, "every": 2, "islands": islands})
    config.sync.dtype = COMPRESSED.get(method, "float32")
    config.eval_every = config.checkpoint.every = 2
    config.model.dropout = 0.2
    devices = jax.local_devices()[:4]
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    stopped = loop.train(config, tmp_path / "parts", devices=devices, stop_requested=after(4))
    # The round under way is the last: of two steps where replicas train alone.
    assert not stopped.finished
    assert stopped.step == (2 if method in ("parameter_mean", "diloco") else 1)
    parts = loop.train(config, tmp_path / "parts", devices=devices)
    for a, b in zip(*map(jax.tree.leaves, (whole.state, parts.state)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_resuming_is_not_stopping_with_fragments_and_a_delay(config, tmp_path):
    """Bit by bit, also each device's own parameters; evaluated are those that all share."""
    config.sync.update({"method": "diloco", "every": 4, "fragments": 2, "delay": 1, "islands": 2})
    config.sync.dtype = "int4"
    config.eval_every = config.checkpoint.every = 2
    devices = jax.local_devices()[:4]
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    stopped = loop.train(config, tmp_path / "parts", devices=devices, stop_requested=after(4))
    assert (stopped.step, stopped.finished) == (2, False)
    parts = loop.train(config, tmp_path / "parts", devices=devices)
    for a, b in zip(*map(jax.tree.leaves, (whole.state, parts.state)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    own = jax.device_get(parts.state.local_params["embed"]["embedding"])
    assert (own[0] == own[1]).all() and (own[1] != own[2]).any()  # By islands.
    _, found = evaluation.evaluate_checkpoint(tmp_path / "parts", devices=devices)
    assert found[""].loss == parts.evaluation.loss


@pytest.mark.parametrize("fragments", [1, 2])
def test_a_run_goes_on_with_other_devices_and_islands(config, tmp_path, fragments):
    """Without what was lost or the moments of its islands, its losses would be others."""
    config.sync.update({"method": "diloco", "every": 2 * fragments, "dtype": "int4"})
    config.sync.fragments = fragments
    config.eval_every = config.checkpoint.every = 2
    found = []
    for devices, islands in ((4, 2), (4, 4), (2, 1)):
        config.sync.islands = islands
        config.num_train_steps += 2
        result = loop.train(config, tmp_path, devices=jax.local_devices()[:devices])
        found.append(result.evaluation.loss)
        assert jax.tree.leaves(result.state.residual)[0].shape[0] == devices
    assert found[2] < found[1] < found[0]
    # The steps of a round have one speed, that of the round.
    speeds = [r["tokens_per_second"] for r in read_jsonl(tmp_path) if "train/loss" in r]
    assert speeds[::2] == speeds[1::2]
    config.sync.dtype = "float32"
    with pytest.raises(ConfigError, match=r"sync\.dtype='float32' \(was 'int4'\)"):
        loop.train(config, tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_methods_with_one_state_can_follow_each_other(config, tmp_path, optimizer):
    """The same losses as gradient_mean alone; DiLoCo's state is another, and it is refused."""
    config.model.dropout, config.optimizer.name = 0.2, optimizer
    config.optimizer.schedule = "constant"  # Parts of the run know nothing of its length.
    config.num_train_steps = 9
    loop.train(config, tmp_path / "whole", devices=jax.local_devices()[:2])
    for method, devices, steps in (("sharded", 4, 3), ("fixed_order", 8, 6), ("sharded", 2, 9)):
        config.sync.method = method
        config.num_train_steps = steps
        loop.train(config, tmp_path / "parts", devices=jax.local_devices()[:devices])
    assert_close_losses(figures(tmp_path / "whole"), figures(tmp_path / "parts"))
    config.sync.update({"method": "diloco", "every": 3})
    with pytest.raises(ConfigError, match=r"sync\.method='diloco' \(was 'sharded'\)"):
        loop.train(config, tmp_path / "parts")


@pytest.mark.parametrize("when", ["at a check", "before a checkpoint"])
def test_a_corrupted_replica_stops_the_run_before_anything_is_saved(
    config, tmp_path, monkeypatch, when
):
    create_state = session.create_state

    def corrupted(setup, replicas, read):
        state = create_state(setup, replicas, read)
        path = "layer_0/mlp/up/kernel"
        return state.replace(params=corrupt(state.params, path, 2, replicas, flip_lowest_bit))

    monkeypatch.setattr(session, "create_state", corrupted)
    config.optimizer.learning_rate = 0.0  # So that one bit stays one bit.
    config.sync.check_every = 2 if when == "at a check" else 100
    step = 2 if when == "at a check" else 3
    message = f"after step {step} device 2 of 0..3 .* first in params/layer_0/mlp/up/kernel"
    with pytest.raises(RunError, match=message):
        loop.train(config, tmp_path, devices=jax.local_devices()[:4])
    assert not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("method", ["gradient_mean", "parameter_mean"])
def test_epochs_end_with_a_batch_that_is_not_full(config, tmp_path, method):
    """The last batch leaves devices without a token; the run ends with the losses of one device."""
    config.update({"num_epochs": 1, "seq_len": 128, "eval_every": 100, "log_every": 1})
    config.sync.update({"method": method, "every": 10})
    config.checkpoint.every = 100
    result = loop.train(config, tmp_path / "many", devices=jax.local_devices()[:8])
    records = figures(tmp_path / "many")
    assert result.finished and [r["step"] for r in records] == list(range(1, result.step + 1))
    assert records[0]["balance/padding"] == 0 < records[-1]["balance/padding"]
    assert records[-1]["balance/tokens_min"] == 0 < records[-1]["balance/tokens_max"]
    if method == "gradient_mean":
        loop.train(config, tmp_path / "one", devices=jax.local_devices()[:1])
        assert_close_losses(figures(tmp_path / "one"), records)


def test_a_changed_batch_size_leaves_the_epochs_what_they_are(config, tmp_path, capsys):
    """Also where the newest checkpoint is damaged, and an older one has another batch size."""
    config.update({"num_epochs": 1, "seq_len": 128, "eval_every": 100})
    config.checkpoint.update({"every": 2, "keep_last": 4})
    devices, saved = jax.local_devices()[:1], {}
    for batch, times in ((8, 4), (16, 4), (32, 100)):
        config.global_batch_size = batch
        if batch == 32:
            newest = max(saved)
            (tmp_path / "checkpoints" / str(newest) / "state" / "manifest.ocdbt").unlink()
        result = loop.train(config, tmp_path, devices=devices, stop_requested=after(times))
        saved |= {
            int(path.name): integrity.read_extra(path)["sequences"]
            for path in integrity.steps(tmp_path / "checkpoints")
        }
    out = capsys.readouterr().out
    assert f"Checkpoint {newest} is damaged" in out and "global_batch_size 16 -> 32" in out
    assert result.finished
    # Every sequence was seen once: what each step counted adds up to the epoch.
    [total] = saved[result.step]
    records = figures(tmp_path)
    assert [r["step"] for r in records] == list(range(1, result.step + 1))
    assert sum(r["balance/tokens_max"] for r in records) == total * 128
    assert "(1.00 epochs)" in out.rpartition("  training")[2]


def test_masked_language_model(config, tmp_path):
    config.objective = "masked"
    config.tokenizer = "byte"
    config.sample.num_tokens = 8  # Of no use to such a model, and no mistake.
    result = loop.train(config, tmp_path, devices=jax.local_devices()[:2])
    assert result.finished
    with pytest.raises(ConfigError, match="can't continue text"):
        generate(tmp_path, ["a"])


def test_every_option_of_the_model_trains(config, tmp_path):
    config.model.update(
        {
            "positions": "rotary",
            "norm": "rmsnorm",
            "activation": "swiglu",
            "tied_head": False,
            "bias": True,
            "num_kv_heads": 1,
            "dropout": 0.1,
            "dtype": "bfloat16",
            "remat": True,
            "scan_layers": True,
            "vocab_multiple": 32,
        }
    )
    config.tokenizer = "train:bpe:300"
    config.grad_accum_steps = 2
    result = loop.train(config, tmp_path, devices=jax.local_devices()[:2])
    assert result.finished and np.isfinite(result.evaluation.loss)
    [text] = generate(tmp_path, ["7 is"], num_tokens=30)
    assert text.startswith("7 is") and len(text) > 20


def test_another_run_is_not_overwritten(workdir):
    config, devices = loop.configs.load(workdir / "config.json"), jax.local_devices()[:1]
    before = contents(workdir)
    other = config.copy_and_resolve_references()
    other.model.num_layers = 3
    with pytest.raises(ConfigError, match=r"model\.num_layers=3 \(was 1\)"):
        loop.train(other, workdir, devices=devices)
    other = config.copy_and_resolve_references()
    other.data.eval_fraction = 0.2
    with pytest.raises(ConfigError, match="no longer gives the tokens"):
        loop.train(other, workdir, devices=devices)
    assert contents(workdir) == before
