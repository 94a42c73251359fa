"""The ways to start several machines, with stand-ins for what isn't on this one."""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jaxdp.common.cli import WRONG_INPUT
from support.runs import flags
from support.texts import REPOSITORY

LAUNCH = REPOSITORY / "launch"
STOPPED = 75
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# ssh gives its words, joined, to a shell on the host; "down" can't be reached.
SSH = """#!/bin/bash
while [[ $1 == -o ]]; do shift 2; done
echo "$1" >> "$FAKES/hosts"
[[ $1 != down ]] || { sleep 5; exit 255; }
shift
exec sh -c "$*"
"""
# srun starts the tasks; its status is the highest of theirs.
SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=0 ]] || exit 99
shift
export SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_STEP_NODELIST=localhost
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    echo $! >> "$FAKES/tasks"
    tasks[i]=$!
done
highest=0
for task in "${tasks[@]}"; do
    wait "$task"
    status=$?
    ((status > highest)) && highest=$status
done
exit $highest
"""
SCANCEL = """#!/bin/bash
[[ $2 == "$SLURM_JOB_ID" ]] && xargs kill "-${1#--signal=}" < "$FAKES/tasks"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$FAKES/asked"
"""
SQUEUE = """#!/bin/bash
[[ $* == "--noheader --job=$SLURM_JOB_ID --format=%T" ]] && echo "$STATE"
"""
FAKES = {"ssh": SSH, "srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "squeue": SQUEUE}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    """By bash and shellcheck; each says in its first lines how to use it."""
    subprocess.run(["bash", "-n", script], check=True)
    subprocess.run([Path(sys.executable).with_name("shellcheck"), script], check=True)
    assert f"launch/{script.name} " in "".join(script.read_text().splitlines()[:5])
    assert os.access(script, os.X_OK)


def test_a_jobset_starts_the_processes_of_one_run():
    """Its names and numbers fit each other and the command's exit statuses."""
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    given = dict(re.fullmatch("--([^=]*)=(.*)", arg).groups() for arg in container["args"])
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == int(given["num_processes"])
    name = jobset["metadata"]["name"]
    host, port = given["coordinator_address"].split(":")
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert container["ports"] == [{"containerPort": int(port)}]
    assert given["process_id"] == "$(JOB_COMPLETION_INDEX)"

    actions = {
        value: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for value in rule["onExitCodes"]["values"]
    }
    assert actions == {STOPPED: "Ignore", WRONG_INPUT: "FailJob"}
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    [rule] = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert any(given["workdir"].startswith(m["mountPath"]) for m in container["volumeMounts"])


def test_a_jobset_gives_the_command_flags_that_it_knows(command):
    """It gets as far as the number of the process, of which there is one too many here."""
    [job] = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-u", "-m", "jaxdp.train"]
    arguments = [arg.replace("$(JOB_COMPLETION_INDEX)", "2") for arg in container["args"]]
    assert "--process_id=2 is out of range" in command("train", *arguments, check=2).stderr


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Starts a script as a user does, with stand-ins first on PATH."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name, text in FAKES.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    # SLURM's port is one of 4,096, chosen by the number of the job.
    job = next(i for i in range(os.getpid() % 4000, 4096) if is_free(61440 + i))
    environ = os.environ | {
        "PATH": f"{fakes}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FAKES": str(fakes),
        "JAX_NUM_CPU_DEVICES": "2",
    }
    by_script = {
        "ssh.sh": {"JAX_COORDINATOR_PORT": str(61440 + job)},
        "slurm.sh": {"SLURM_JOB_ID": str(job), "SLURM_NTASKS": "2", "STATE": "RUNNING"},
    }
    started = []

    def start(script, *arguments, **more):
        (fakes / "tasks").unlink(missing_ok=True)
        process = subprocess.Popen(
            [LAUNCH / script, *arguments],
            cwd=REPOSITORY,
            env=environ | by_script[script] | more,
            stdout=(tmp_path / "printed").open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def is_free(port):
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) != 0


def stop_and_go_on(start, config, tmp_path):
    """Sends SIGTERM to a script in the middle of a run; then starts it twice, for no more steps."""
    config.update({"log_every": 10, "eval_every": 20_000})
    config.checkpoint.every = 20_000
    workdir, printed = tmp_path / "run", tmp_path / "printed"
    process = start(*flags(config, workdir, num_train_steps=20_000))
    deadline = time.time() + 120
    while "step     10/" not in printed.read_text():
        assert process.poll() is None and time.time() < deadline, printed.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == STOPPED, printed.read_text()
    [step] = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    for _ in range(2):  # The first evaluates what was saved.
        process = start(*flags(config, workdir, num_train_steps=step))
        assert process.wait(120) == 0, printed.read_text()
    assert "4 x cpu in 2 processes" in printed.read_text()
    assert f"Already finished: all {step} steps" in printed.read_text().replace(",", "")


def test_ssh_starts_and_stops_all(config, tmp_path, launch):
    hosts = ["127.0.0.1", "someone@localhost"]
    stop_and_go_on(functools.partial(launch, "ssh.sh", ",".join(hosts)), config, tmp_path)
    assert sorted((tmp_path / "fakes/hosts").read_text().split()) == sorted(3 * hosts)


def test_ssh_stops_all_when_one_fails(config, tmp_path, launch):
    """The process that could be started waits for the other, for 300 s if nobody stops it."""
    process = launch("ssh.sh", "localhost,down", *flags(config, tmp_path / "run"))
    assert process.wait(120) == 255, (tmp_path / "printed").read_text()


def test_a_slurm_job_saves_and_is_queued_again(config, tmp_path, launch):
    """SIGTERM comes to the batch shell only; once finished, the job is not queued again."""
    stop_and_go_on(functools.partial(launch, "slurm.sh"), config, tmp_path)
    [asked] = (tmp_path / "fakes/asked").read_text().splitlines()
    assert re.fullmatch(r"requeue \d+", asked)


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [
        (75, "RUNNING", True),
        (75, "COMPLETING", False),
        (1, "RUNNING", False),
        (0, "RUNNING", False),
    ],
)
def test_a_slurm_job_is_queued_again_only_when_stopped_as_asked(
    tmp_path, launch, status, state, requeued
):
    """And not when its user has canceled it, which SLURM shows as completing."""
    (tmp_path / "fakes/python").write_text(f"#!/bin/sh\nexit {status}\n")
    (tmp_path / "fakes/python").chmod(0o755)
    assert launch("slurm.sh", STATE=state).wait(60) == status
    assert (tmp_path / "fakes/asked").exists() == requeued
