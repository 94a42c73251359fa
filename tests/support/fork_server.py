"""Starts Python programs from a process that has imported their libraries already.

`python -u fork_server.py FD` listens on a socket for jobs: a program's arguments, folder and
environment, and its stdin, stdout, stderr. For each it forks; the child takes the job's place in
the world, sets JAX as its environment says, and runs the program. No library is started here, only
imported: no JAX backend, no operation of TensorFlow, no thread.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import socket
import sys
import warnings

LIBRARIES = (
    "absl.logging",
    "flax.training.train_state",
    "jax.experimental.multihost_utils",
    "ml_collections.config_flags",
    "optax",
    "orbax.checkpoint",
    "rich.progress",
    "safetensors.numpy",
    "tensorboardX",
    "tokenizers",
)
LARGEST = 2**20  # Bytes of a job.


def import_libraries() -> dict[str, str]:
    """Imports what the commands need; returns what the libraries have put into the environment."""
    before = set(os.environ)
    for name in LIBRARIES:
        importlib.import_module(name)
    added = {name: os.environ[name] for name in os.environ if name not in before}
    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # No Keras, as in jaxdp.data.tensorflow.
    with open(os.devnull, "w") as nowhere, os.fdopen(os.dup(2)) as terminal:
        os.dup2(nowhere.fileno(), 2)  # TensorFlow greets there.
        importlib.import_module("tensorflow")
        os.dup2(terminal.fileno(), 2)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: no child could rely on their locks"
    gc.freeze()
    return added


def serve(control: socket.socket) -> tuple[dict, list[int]]:
    """Forks for each job until the other end is closed; returns the job, in its child."""
    selector, running = selectors.DefaultSelector(), {}
    selector.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not control:
                selector.unregister(key.fileobj)
                report_end(key.fd, *running.pop(key.fd))
                continue
            message, fds, _, _ = socket.recv_fds(control, LARGEST, 4)
            if not message:
                os._exit(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # JAX warns of threads; there are none.
                child = os.fork()
            if not child:
                selector.close()
                for fd in (control.detach(), fds.pop(), *running):
                    os.close(fd)
                for _, other in running.values():
                    os.close(other.detach())
                return json.loads(message), fds
            status = socket.socket(fileno=fds.pop())
            status.send(str(child).encode())
            for fd in fds:
                os.close(fd)
            ended = os.pidfd_open(child)
            running[ended] = (child, status)
            selector.register(ended, selectors.EVENT_READ)


def report_end(ended: int, child: int, status: socket.socket) -> None:
    """Tells who waits for a child how it ended."""
    os.close(ended)
    _, code = os.waitpid(child, 0)
    with contextlib.suppress(OSError):  # Perhaps nobody waits.
        status.send(str(os.waitstatus_to_exitcode(code)).encode())
    status.close()


def become(argv: list[str], cwd: str, env: dict[str, str], fds: list[int]) -> None:
    """Makes this process what a new one would be."""
    os.setpgid(0, 0)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = argv, cwd
    configure_jax(env)


def configure_jax(env: dict[str, str]) -> None:
    """Sets what JAX read from another environment when it was imported here."""
    import jax

    for name, value in list(jax.config.values.items()):
        text = env.get(name.upper())
        if text is None:
            continue
        if isinstance(value, bool):
            jax.config.update(name, text.lower() in ("y", "yes", "t", "true", "on", "1"))
        elif isinstance(value, int | float):
            jax.config.update(name, type(value)(text))
        else:
            jax.config.update(name, text)


if __name__ == "__main__":
    set_by_libraries = import_libraries()
    job, files = serve(socket.socket(fileno=int(sys.argv[1])))
    module, *arguments = job["argv"]
    become([module, *arguments], job["cwd"], set_by_libraries | job["env"], files)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
