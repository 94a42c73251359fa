"""`python -m jaxdp.train` as a user starts it."""

import contextlib
import json
import os
import signal
import time

import pytest

from jaxdp.workdir.metrics import read_jsonl
from support.forks import Process
from support.processes import Run, environment_of
from support.runs import CLOCKED, TIMES, figures, flags
from support.texts import REPOSITORY


@contextlib.contextmanager
def nameless(folder):
    """Makes the user of new interpreters a number without a name and a home, as in containers."""
    (folder / "sitecustomize.py").write_text(
        "import pwd\ndef unknown(_): raise KeyError\npwd.getpwuid = pwd.getpwnam = unknown\n"
    )
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("PYTHONPATH", f"{folder}{os.pathsep}{REPOSITORY}")
        for name in ("HOME", "XDG_CACHE_HOME", "KERAS_HOME"):
            changed.delenv(name, raising=False)
        yield
    assert not (REPOSITORY / "~").exists()


def test_a_run_and_all_it_leaves(config, tmp_path, command, fresh_command, monkeypatch):
    """Also where stdout can't encode a character (an old locale), and the user has no home."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    workdir = tmp_path / "größe"
    config.num_train_steps, config.sample.num_tokens = 60, 8
    with nameless(tmp_path):
        out = fresh_command("train", *flags(config, workdir, eval_every=30), devices=2).stdout
    for text in (
        "2 x cpu in 1 process",
        "8 sequences x 16 tokens",
        "per host 8, per device 4, micro 4",
        "adamw, 0.01 after 2 steps of warm-up, cosine to 0.001",
        "every 30 steps, on the whole validation split; bits/byte is",
        "evaluation at step 30: loss",
        "bits/byte",
        "gradient_mean, 1 all-reduce per step",
        "Compiled: 1 all-reduce",
        "of the devices' time in collectives",
        f"{tmp_path}/gr??e",
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


def test_a_signal_saves_and_exits_with_75(config, tmp_path, command):
    config.update({"num_train_steps": 20_000, "eval_every": 10_000})
    config.checkpoint.every = 10_000
    run = Run(*flags(config, tmp_path), devices=2)
    assert run.until_printed("\nstep "), run.printed
    for _ in range(3):  # As from a terminal, from a shell, and from a scheduler.
        run.process.send_signal(signal.SIGTERM)
    assert run.ended() == 75, run.printed
    assert run.printed.count("jaxdp: stopping after this step (SIGTERM)\n") == 1
    assert "Stopped as asked; run again to go on" in run.printed
    [step] = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    command("train", *flags(config, tmp_path, num_train_steps=step + 2))
    assert [r["step"] for r in read_jsonl(tmp_path)] == list(range(1, step + 3))


def test_ctrl_c_with_a_pipe_into_a_program_that_ends_at_once(config, tmp_path):
    """As `| tee` does: the run writes to a pipe that nobody reads, and saves all the same."""
    config.update({"num_train_steps": 20_000, "eval_every": 10_000})
    config.checkpoint.every = 10_000
    read, write = os.pipe()
    os.close(read)
    environ, said = environment_of(2), (tmp_path / "stderr").open("w+")
    arguments = ("jaxdp.train", *flags(config, tmp_path / "run"))
    with said, os.fdopen(write, "w") as out:
        process = Process(*arguments, cwd=REPOSITORY, env=environ, stdout=out, stderr=said)
        until((tmp_path / "run" / "metrics.jsonl").exists, process)
        process.send_signal(signal.SIGINT)
        status = process.wait(60)
        said.seek(0)
        [line] = [x for x in said.read().splitlines() if "no NVIDIA GPU" not in x]
    assert status == 75 and line == "jaxdp: stopping after this step (SIGINT)"
    [step] = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert [r["step"] for r in read_jsonl(tmp_path / "run")] == list(range(1, step + 1))


def until(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)


def test_a_signal_while_a_corpus_is_tokenised_ends_the_run_at_once(config, tmp_path):
    """Here a tokenizer is being trained, where Rust's code would let Python handle nothing."""
    fifo = tmp_path / "text.txt"
    fifo.write_text("a b c d " * 3_000_000)
    config.data.path, config.tokenizer = str(fifo), "train:bpe:20000"
    config.data.cache_dir = str(tmp_path / "cache")
    run = Run(*flags(config, tmp_path / "run"), devices=2)
    assert run.until_printed("Training a tokenizer")
    run.process.send_signal(signal.SIGUSR1)
    assert run.ended() == 75, run.printed
    assert "stopped as asked, before the training began" in run.printed
    assert not (tmp_path / "run").exists()


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
