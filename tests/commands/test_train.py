"""`python -m jaxdp.train` as a user starts it."""

import json
import signal

import pytest

from jaxdp.workdir.metrics import read_jsonl
from support.processes import Run
from support.runs import CLOCKED, TIMES, figures, flags


def test_a_run_and_all_it_leaves(config, tmp_path, command, fresh_command):
    workdir = tmp_path / "run"
    config.num_train_steps, config.sample.num_tokens = 60, 8
    out = fresh_command("train", *flags(config, workdir, eval_every=30), devices=2).stdout
    for text in (
        "2 x cpu in 1 process",
        "8 sequences x 16 tokens",
        "per host 8, per device 4, micro 4",
        "evaluation at step 30: loss",
        "bits/byte",
        "gradient_mean, 1 all-reduce per step",
        "Compiled: 1 all-reduce",
        "of the devices' time in collectives",
        "Sample",
        "Finished",
    ):
        assert text in out
    assert json.loads((workdir / "config.json").read_text())["num_train_steps"] == 60
    assert (workdir / "tokenizer.json").exists()
    assert list((workdir / "tensorboard").iterdir())
    assert {"57", "60"} <= {p.name for p in (workdir / "checkpoints").iterdir()}
    records = read_jsonl(workdir)
    assert [r["step"] for r in records] == list(range(1, 61))
    assert {"train/loss", "eval/loss", "eval/perplexity", *TIMES} <= records[-1].keys()
    # The text is easy; a model that learns nothing stays at log(27) = 3.3.
    assert records[-1]["eval/loss"] < 2.5

    again = command("train", *flags(config, workdir, eval_every=30))
    assert "Already finished: all 60 steps are done" in again.stdout
    assert figures(workdir) == [{k: v for k, v in r.items() if k not in CLOCKED} for r in records]

    prompts = ("--prompt=1 is", "--prompt=2 is")
    text = fresh_command("generate", f"--workdir={workdir}", *prompts).stdout
    assert text.startswith("1 is") and "\n2 is" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_75(config, tmp_path, command, number):
    config.num_train_steps = 20_000
    run = Run(*flags(config, tmp_path, eval_every=10_000), devices=2)
    assert run.until_printed("\nstep "), run.printed
    run.process.send_signal(number)
    assert run.ended() == 75, run.printed
    assert "Stopped as asked; run again to go on" in run.printed
    [step] = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()][-1:]
    command("train", *flags(config, tmp_path, num_train_steps=step + 2, eval_every=10_000))
    assert [r["step"] for r in read_jsonl(tmp_path)] == list(range(1, step + 3))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.no_such_key=1", "no_such_key='1' is no key of the config"),
        ("--config.model.num_layer=1", "did you mean model.num_layers?"),
        ("--config.seq_len=long", "--config.seq_len=long"),
        ("--config.seq_len=1", "seq_len=1 is out of range"),
        ("--config.global_batch_size=3", "global_batch_size=3 can't be split equally"),
        ("--config.data.path=/no/such/file", "data.path='/no/such/file' matches no file"),
        ("--config.data.path=tfds:nonsense", "data.path='tfds:nonsense' is not known to TFDS"),
        ("--config.seq_len=10000", "too few for one sequence of seq_len=10000"),
        ("--workdir=/proc/nowhere", "--workdir=/proc/nowhere can't be written"),
        ("--config=configs/nowhere.py", "no such file; the nearest is configs/"),
        ("nonsense", "'nonsense' is not understood"),
        ("--processes=two", "--processes=two is no number of processes"),
        ("--processes=auto", "--processes=auto is one for each GPU"),
        ("--processes=3", "global_batch_size=8 can't be split equally over 6 devices"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(config, tmp_path, command, override, message):
    workdir = tmp_path / "run"
    process = command("train", *flags(config, workdir), override, devices=2, check=2)
    [line] = [x for x in process.stderr.splitlines() if x.startswith("jaxdp: ")]
    assert message in line
    assert "Traceback" not in process.stderr
    assert not (workdir / "config.json").exists()


def test_a_missing_accelerator_is_one_line_and_status_2(config, tmp_path, command, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    process = command("train", *flags(config, tmp_path / "run"), check=2)
    assert "jaxdp: JAX_PLATFORMS='cuda' can't be used" in process.stderr
    assert "Traceback" not in process.stderr


def test_processes_that_a_scheduler_has_started_start_no_others(
    config, tmp_path, command, monkeypatch
):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    arguments = [*flags(config, tmp_path / "run"), "--processes=2"]
    [line] = command("train", *arguments, check=2).stderr.splitlines()
    assert line.startswith(
        "jaxdp: --processes=2 can't go with a scheduler that has started several"
    )
    assert "(SLURM_STEP_NUM_TASKS is set)" in line
