import json
import math
import shutil

import jax
import pytest

from jaxdp.common import config as configs
from jaxdp.common.errors import ConfigError, RunError
from jaxdp.run import evaluation, loop
from jaxdp.run.evaluation import evaluate_checkpoint
from jaxdp.workdir import integrity
from support.bad_input import contents
from support.runs import figures, flags
from support.texts import TEXT

LOGGED = ("eval/loss", "eval/perplexity", "eval/bits_per_byte")


def logged(workdir, step):
    [record] = [r for r in figures(workdir) if r["step"] == step]
    masked = json.loads((workdir / "config.json").read_text())["objective"] == "masked"
    assert ("eval/bits_per_byte" in record) != masked  # That loss is no length of the text.
    return {name: record[name] for name in LOGGED[: 2 if masked else 3]}


def evaluated(workdir, which="newest", **changes):
    """Its step, and its figures as they are logged, on one device."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    devices = jax.local_devices()[:1]
    step, found = evaluate_checkpoint(workdir, which, changes, devices=devices)
    return step, evaluation.figures(found)


def test_it_is_what_the_run_logged_to_the_bit_and_changes_nothing(workdir):
    before = contents(workdir)
    assert evaluated(workdir) == (4, logged(workdir, 4))
    assert evaluated(workdir, "4") == (4, logged(workdir, 4))
    assert evaluated(workdir, "best")[0] == 4  # The only one that has been evaluated.
    assert evaluated(workdir, "2")[1]["eval/loss"] > logged(workdir, 4)["eval/loss"]
    assert contents(workdir) == before


def test_devices_need_not_be_those_of_the_run(workdir):
    """One device is no two islands, and a batch of 4 no 3 micro-batches."""
    before = evaluated(workdir)
    local = {"sync__method": "parameter_mean", "sync__every": 2, "sync__islands": 2}
    assert evaluated(workdir, **local) == before
    assert evaluated(workdir, sync__method="fixed_order", sync__virtual_replicas=8) == before
    step, found = evaluated(workdir, grad_accum_steps=3)  # Of one row each; sums are in turn.
    assert step == before[0]
    assert found["eval/loss"] == pytest.approx(before[1]["eval/loss"], rel=1e-6)


def test_other_text_is_read_with_the_runs_tokenizer(workdir, tmp_path):
    """The same text under another name is the same; a part of it knows all characters."""
    path = tmp_path / "copy.txt"
    path.write_text(TEXT)
    same = evaluated(workdir, data__path=str(path), data__eval_fraction=0.1)[1]
    assert same == logged(workdir, 4)
    path.write_text(TEXT[:3000])
    _, part = evaluated(workdir, data__path=str(path), data__eval_fraction=0.9)
    assert part["eval/loss"] == pytest.approx(logged(workdir, 4)["eval/loss"], rel=0.2)
    path.write_text("~" * 3000)
    with pytest.raises(ConfigError, match="'~'"):
        evaluated(workdir, data__path=str(path))


def test_all_of_a_given_text_is_evaluated(workdir, tmp_path):
    """Of the run's own text, by whatever name, it is the validation split.

    Even if the run evaluated on a few batches only, to save time.
    """
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"eval_max_batches": 1}))
    path = tmp_path / "other.txt"
    path.write_text(TEXT[:1601])
    changes = {"data.path": f"text:{path}"}
    _, found = evaluate_checkpoint(workdir, changes=changes, devices=jax.local_devices()[:1])
    assert found[""].tokens == 1600  # Each character of `TEXT` is a token.
    (workdir / "config.json").write_text(json.dumps(config))
    own = configs.load(workdir / "config.json").data.path
    (tmp_path / "link.txt").symlink_to(own)
    for name in (own, str(tmp_path / "link.txt")):
        assert evaluated(workdir, data__path=name) == (4, logged(workdir, 4))


@pytest.fixture
def parts(short, tmp_path):
    """A run on a folder of three files of 900 characters; its workdir, and a way to evaluate it.

    That returns {eval set: tokens}, and the lines that are said of what is trained on.
    """
    (tmp_path / "set").mkdir()
    for name in "abc":
        (tmp_path / "set" / f"{name}.txt").write_text(TEXT[:900])
    short.data.path = str(tmp_path / "set")
    loop.train(short, tmp_path / "run", devices=jax.local_devices()[:1])

    def evaluate(**changes):
        said: list[str] = []
        flat = {key.replace("__", "."): value for key, value in changes.items()}
        devices = jax.local_devices()[:1]
        _, found = evaluate_checkpoint(
            tmp_path / "run", "newest", flat, devices=devices, say=said.append
        )
        tokens = {name: evaluation.tokens for name, evaluation in found.items()}
        return tokens, [line for line in said if "trained on" in line]

    return tmp_path, evaluate


def test_evaluation_on_what_the_run_trained_on_is_said(parts):
    """Given some of the files that the run has, all of their text is evaluated, with a warning."""
    folder, evaluate = parts
    (folder / "other.txt").write_text(TEXT[900:1900])
    every = ",".join(f"{folder}/set/{name}.txt" for name in "abc")
    assert evaluate() == evaluate(data__path=every) == ({"": 269}, [])
    assert evaluate(data__path=f"{folder}/other.txt") == ({"": 999}, [])
    assert evaluate(data__eval_fraction=0.05) == ({"": 134}, [])
    for changes, tokens in (
        ({"data__path": f"{folder}/set/a.txt"}, {"": 899}),
        ({"data__path": f"{folder}/*/[bc].txt"}, {"": 1799}),
        ({"data__path": f"{folder}/set/c.txt", "data__eval_fraction": 0.1}, {"": 89}),
        ({"data__eval_fraction": 0.5}, {"": 1349}),
        ({"eval_sets": f"x={folder}/set/a.txt"}, {"": 269, "x": 899}),
    ):
        found, [line] = evaluate(**changes)
        assert found == tokens
        assert line.startswith(("Evaluation may be on text that is", "Evaluation set x may be"))


def test_all_of_a_text_is_evaluated_by_a_run_on_records(short, tmp_path):
    """What is about the run's kind of data doesn't concern it."""
    lines = [f'{{"q": "{i} is ", "text": "{"odd" if i % 2 else "even"}"}}\n' for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "other.txt").write_text(TEXT[:1601])
    short.data.update({"path": f"{tmp_path}/a.jsonl", "packing": "padded", "prompt_key": "q"})
    short.tokenizer, short.eval_sets = "byte", f"own={tmp_path}/a.jsonl"
    found = loop.train(short, tmp_path / "run", devices=jax.local_devices()[:1]).evaluations
    devices, changes = jax.local_devices()[:1], {"data.path": f"{tmp_path}/other.txt"}
    _, other = evaluate_checkpoint(tmp_path / "run", changes=changes, devices=devices)
    assert other[""].tokens == 1601  # And a token that ends it.
    assert other["own"] == found["own"]


def test_a_run_in_wandb_is_evaluated_without_it(workdir, monkeypatch):
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"wandb_project": "p"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert evaluated(workdir) == (4, logged(workdir, 4))


def test_a_text_that_has_changed_is_refused(trained, workdir, tmp_path):
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "changed.txt")
    (workdir / "config.json").write_text(json.dumps(config))
    (tmp_path / "changed.txt").write_text(TEXT.replace("1 is odd", "1 is ood"))
    with pytest.raises(ConfigError, match="no longer gives the tokens"):
        evaluated(workdir)


def test_a_config_of_another_version_will_do(workdir):
    """Keys that it lacks, or that are no more, are none of the model's."""
    config = json.loads((workdir / "config.json").read_text())
    del config["stop"], config["hang_seconds"]
    (workdir / "config.json").write_text(json.dumps(config | {"forgotten": 3}))
    assert evaluated(workdir) == (4, logged(workdir, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_layers": 2}, r"model\.num_layers=2 \(was 1\)"),
        ({"nonsense": 2}, "nonsense=2 is no key"),
        ({"eval_max_batches": -1}, "eval_max_batches=-1 is out of range"),
        ({"data__path": "/no/such/file"}, "data.path='/no/such/file' matches no file"),
        ({"data__eval_fraction": 1e-4}, "validation tokens, too few"),
    ],
)
def test_what_can_not_be_evaluated_is_refused(workdir, changes, message):
    with pytest.raises(ConfigError, match=message):
        evaluated(workdir, **changes)


def test_a_damaged_checkpoint_is_not_replaced_by_another_that_was_not_asked_for(workdir):
    shutil.rmtree(workdir / "checkpoints" / "4" / "state")
    assert evaluated(workdir)[0] == 2
    for which in ("4", "best"):
        with pytest.raises(RunError, match=r"Checkpoint 4 is damaged .* or choose another"):
            evaluated(workdir, which)
    with pytest.raises(ConfigError, match=r"--step=3 is no checkpoint in .*: choose one of 4, 2"):
        evaluated(workdir, "3")


def test_the_best_checkpoint_has_the_lowest_finite_loss(tmp_path):
    losses = {1: math.nan, 2: 1.5, 3: -math.inf, 4: 1.25, 5: 1.25, 6: 10**400, 7: None, 8: "0"}
    for step, loss in losses.items():
        (tmp_path / str(step) / "metrics").mkdir(parents=True)
        (tmp_path / str(step) / "metrics" / "metrics").write_text(
            json.dumps({integrity.METRIC: loss})
        )
    (tmp_path / "9").mkdir()
    assert (
        integrity.step_of(tmp_path, [9, 8, 7, 6, 5, 4, 3, 2, 1], "best") == 5
    )  # The newer of two.
    with pytest.raises(ConfigError, match=r"no checkpoint in .* has been evaluated"):
        integrity.step_of(tmp_path, [9, 8, 7, 3, 1], "best")


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_command_says_what_the_run_logged(config, tmp_path, fresh_command, objective):
    """On two devices, of a run that holds nothing that isn't sharded or masked."""
    config.objective, config.sync.method = objective, "sharded"
    config.model.dropout = 0.2
    workdir = tmp_path / "run"
    loop.train(config, workdir, devices=jax.local_devices()[:2])
    devices = jax.local_devices()[:2]
    for step in (3, 6):
        found, result = evaluate_checkpoint(workdir, str(step), devices=devices)
        assert (found, evaluation.figures(result)) == (step, logged(workdir, step))
    before = contents(workdir)
    printed = fresh_command("evaluate", f"--workdir={workdir}", devices=2).stdout
    words, line = printed.splitlines()
    assert words.startswith("evaluation at step 6: loss ") and words.endswith("tokens)")
    # The command's program is optimised by XLA, that of the tests is not.
    assert json.loads(line) == pytest.approx({"step": 6} | logged(workdir, 6), rel=1e-5)
    assert contents(workdir) == before


def test_the_command_is_equal_to_the_bit_to_the_command(config, tmp_path, command):
    command("train", *flags(config, tmp_path), devices=2)
    arguments = (f"--workdir={tmp_path}", "--step=best")
    line = command("evaluate", *arguments, devices=2).stdout.splitlines()[-1]
    step = json.loads(line)["step"]
    assert json.loads(line) == {"step": step} | logged(tmp_path, step)
    command("evaluate", *arguments, f"--config.global_batch_size={16}", devices=2)
    wrongs = ("--step=-1", "--config.model.dim=3", "--config.seq_len=8", "--workdir=/nowhere")
    for wrong in (*wrongs, "--tasks_folder=own"):
        process = command("evaluate", f"--workdir={tmp_path}", wrong, check=2)
        assert process.stderr.startswith("jaxdp: ") and process.stderr.count("\n") == 1
