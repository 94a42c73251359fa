import json
import math
import shutil

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdp.run import loop, session
from jaxdp.run.divergence import Divergence
from jaxdp.run.early_stopping import EarlyStopping
from jaxdp.run.evaluation import evaluate_checkpoint
from support.bad_input import tries
from support.runs import checkpoints_of, figures, params_of, train_in_parts


def judged(config, losses, patience=3, min_delta=0.0):
    config.stop.update({"patience": patience, "min_delta": min_delta})
    stopping = EarlyStopping(config)
    for step, loss in enumerate(losses, 1):
        stopping.add(step, loss)
    return stopping


@pytest.mark.parametrize(
    ("losses", "over"),
    [
        ([], False),
        ([3.0, 2.0, 1.0, 0.5, 0.2], False),
        ([3.0, 3.0, 3.0], False),
        ([3.0, 3.0, 3.0, 3.0], True),
        ([3.0, 3.1, 3.2, 2.9, 3.0, 3.0], False),
        ([math.nan, math.inf], False),
        ([math.nan, math.inf, math.nan], True),
        ([2.0, math.nan, 1.9], False),
    ],
)
def test_so_many_evaluations_without_improvement_end_it(config, losses, over):
    assert judged(config, losses).over == over
    assert not judged(config, losses, patience=0).over


def test_small_improvements_count_together_but_not_each(config):
    """As they are measured from the last that was large enough."""
    slow = [3.0, 2.96, 2.92, 2.88, 2.84]
    assert judged(config, slow, min_delta=0.1).waited == 1
    assert judged(config, slow[:3], min_delta=0.1).waited == 2
    stopping = judged(config, [3.0, 2.99, 2.98, 2.97], min_delta=0.1)
    assert stopping.over and stopping.best == (4, 2.97)
    assert "has not improved by 0.1 in 3 evaluations" in stopping.reason()
    assert stopping.reason().endswith("best: 2.9700 at step 4")


def test_of_equal_evaluations_the_last_is_the_best(config):
    """As --step=best takes the newest."""
    assert judged(config, [3.0, 2.0, 2.5, 2.0, 2.5]).best == (4, 2.0)


def test_an_evaluation_on_other_text_is_the_first(config):
    """Text differs if the number of tokens does; older versions didn't save it: the same text."""
    stopping = judged(config, [1.0, 1.5], patience=2)
    stopping.add(3, 1.2, 90)
    assert stopping.over and stopping.best == (1, 1.0)
    stopping.add(4, 3.0, 70)
    assert not stopping.over and stopping.best == (4, 3.0)
    stopping.add(5, 2.5, 70)
    parts = EarlyStopping(config)
    parts.load(json.loads(json.dumps(stopping.to_json())))
    for step, tokens in ((6, 70), (7, None)):
        assert not parts.over and parts.best == (5, 2.5)
        parts.add(step, 2.6, tokens)
    assert parts.over
    parts.load({"reference": 0.5, "waited": 0, "best": [1, 0.5], "tokens": 90})
    assert parts.best == (1, 0.5)


@tries(200)
@given(
    losses=st.lists(st.floats(0, 4) | st.sampled_from([1.0, math.nan, math.inf]), max_size=20),
    cut=st.integers(0, 20),
    patience=st.integers(0, 4),
    min_delta=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_it_goes_on_as_if_it_had_not_been_interrupted(config, losses, cut, patience, min_delta):
    whole = judged(config, losses, patience, min_delta)
    saved = json.loads(json.dumps(judged(config, losses[:cut], patience, min_delta).to_json()))
    parts = EarlyStopping(config)
    parts.load(saved)
    for step, loss in list(enumerate(losses, 1))[cut:]:
        parts.add(step, loss)
    assert (parts.over, parts.to_json()) == (whole.over, whole.to_json())


def best_of(workdir, devices):
    """The step that --step=best means."""
    return evaluate_checkpoint(workdir, "best", devices=devices)[0]


def test_a_run_that_is_interrupted_stops_early_at_the_same_step(overfitting, tmp_path, capsys):
    config, devices = overfitting, jax.local_devices()[:2]
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    assert whole.finished and 8 < whole.step < 100
    losses = {r["step"]: r["eval/loss"] for r in figures(tmp_path / "whole") if "eval/loss" in r}
    best = min(losses, key=losses.get)
    assert whole.step == best + 6 == max(losses)
    out = capsys.readouterr().out
    assert f"best: {losses[best]:.4f} at step {best}\n" in out and "stopped early" in out
    saved = checkpoints_of(tmp_path / "whole")
    assert max(saved) == whole.step and saved[best][0][0] == losses[best]
    assert best_of(tmp_path / "whole", devices) == best

    parts, interruptions = train_in_parts(config, tmp_path / "parts", devices, times=60)
    assert interruptions and parts.step == whole.step
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    for a, b in zip(params_of(whole), params_of(parts), strict=True):
        assert a.tobytes() == b.tobytes()
    assert best_of(tmp_path / "parts", devices) == best

    capsys.readouterr()
    again = loop.train(config, tmp_path / "parts", devices=devices)
    assert again.finished and again.step == whole.step
    out = capsys.readouterr().out
    assert f"Already finished: stopped early after step {whole.step}, for the validation" in out
    assert f"at step {best}. To train on" in out
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / str(best))
    loop.train(config, tmp_path / "parts", devices=devices)
    assert f"at step {best} (not saved)" in capsys.readouterr().out
    config.update({"num_train_steps": whole.step + 2})
    config.stop.patience = 0
    assert loop.train(config, tmp_path / "parts", devices=devices).step == whole.step + 2


def test_what_is_taken_back_is_not_waited_for(overfitting, tmp_path, monkeypatch):
    """A roll-back returns to what was known at its checkpoint."""
    config, seen = overfitting, []
    config.update({"num_train_steps": 14, "eval_every": 2})
    config.divergence.max_bad_steps = 1
    config.optimizer.learning_rate = 0.0  # So that no evaluation is better than the first.
    config.stop.patience = 6
    add, judge = EarlyStopping.add, Divergence.add

    def spoiled(self, end, losses, skipped):
        judge(self, end, losses, [float(self.rollbacks == 0 and end == 14)] * len(losses))

    monkeypatch.setattr(Divergence, "add", spoiled)
    monkeypatch.setattr(
        EarlyStopping, "add", lambda self, *a: add(self, *a) or seen.append(self.waited)
    )
    result = loop.train(config, tmp_path, devices=jax.local_devices()[:1])
    # Up to step 12, then back to step 10, whose loss is read, and the evaluation of step 14.
    assert seen == [0, 1, 2, 3, 4, 5, 4, 5] and result.finished


def test_the_best_is_kept_when_a_run_goes_back_to_before_it(
    overfitting, tmp_path, monkeypatch, capsys
):
    """At step 14 the run diverges and goes back to checkpoint 10; step 12 had the lowest loss."""
    config, devices = overfitting, jax.local_devices()[:1]
    config.update({"num_train_steps": 20, "eval_every": 2})
    config.optimizer.learning_rate = 0.01
    config.divergence.max_bad_steps = config.stop.patience = 1
    judge = Divergence.add

    def spoiled(self, end, losses, skipped):
        judge(self, end, losses, [float(self.rollbacks == 0 and end == 14)] * len(losses))

    monkeypatch.setattr(Divergence, "add", spoiled)
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    assert whole.step == 14 and "at step 12\n" in capsys.readouterr().out
    parts, interruptions = train_in_parts(config, tmp_path / "parts", devices, times=13)
    assert interruptions and parts.step == 14 and "at step 12\n" in capsys.readouterr().out
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    assert [best_of(tmp_path / name, devices) for name in ("whole", "parts")] == [12, 12]


@pytest.mark.parametrize("every", [2, 100])
def test_the_evaluation_that_ends_a_run_can_be_made_after_it_resumes(
    overfitting, tmp_path, monkeypatch, every
):
    """Step 6 is saved before it, whether or not checkpoint.every says so."""
    config, devices = overfitting, jax.local_devices()[:1]
    config.update({"num_train_steps": 12, "eval_every": 2})
    config.optimizer.learning_rate = 0.0  # So that no evaluation is better than the first.
    config.stop.patience, config.checkpoint.every = 2, every
    evaluate = session.evaluate_all

    def dies_at_the_third(*args):
        if len([r for r in figures(tmp_path / "parts") if "eval/loss" in r]) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    whole = loop.train(config, tmp_path / "whole", devices=devices)
    monkeypatch.setattr(session, "evaluate_all", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "parts", devices=devices)
    monkeypatch.undo()
    parts = loop.train(config, tmp_path / "parts", devices=devices)
    assert (whole.step, whole.finished) == (parts.step, parts.finished) == (6, True)
    assert whole.evaluations == parts.evaluations
    assert checkpoints_of(tmp_path / "whole") == checkpoints_of(tmp_path / "parts")
