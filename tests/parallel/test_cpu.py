"""How a process is set up for CPUs before a run."""

import os
import subprocess
import sys

import pytest

from jaxdp.common import nvidia
from jaxdp.configs import default
from jaxdp.parallel import cpu
from support.texts import REPOSITORY

OURS = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "MALLOC_", "GLIBC_TUNABLES")


def output(code, environ):
    """Runs code in a new Python with only these of the variables in OURS; returns its output."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=outside | environ,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
@pytest.mark.parametrize(
    ("changes", "environ", "devices"),
    [
        ({}, {}, 2),
        ({"global_batch_size": 6, "grad_accum_steps": 2}, {}, 1),
        ({"sync.method": "diloco"}, {}, 1),
        ({}, {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ({}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4),
    ],
)
def test_a_cpu_is_two_devices_unless_that_was_said_otherwise(changes, environ, devices):
    code = (
        "import jax; from jaxdp.parallel import cpu; from jaxdp.configs import default; "
        "from jaxdp.step.setup import same_on_two_devices as same; "
        f"c = default.get_config(); c.update_from_flattened_dict({changes!r}); "
        "cpu.prepare(c, two_devices=same(c)); print(jax.device_count())"
    )
    assert int(output(code, environ)) == devices


@pytest.mark.skipif(bool(nvidia.device_files()), reason="a GPU")
@pytest.mark.parametrize(
    ("seq_len", "environ", "kept"),
    [
        (1024, {}, True),
        (1024, {"MALLOC_ARENA_MAX": "8"}, False),
        (1024, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}, False),
        (64, {}, False),
    ],
)
def test_a_thread_gets_large_blocks_without_new_pages_if_the_model_is_large(seq_len, environ, kept):
    code = (
        "import resource, threading, jax, numpy as np; from jaxdp.parallel import cpu; "
        "from jaxdp.configs import default; c = default.get_config(); "
        f"c.seq_len = {seq_len}; cpu.prepare(c, two_devices=True)\n"
        "def block(): np.ones(2**27, np.int8)\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    thread = threading.Thread(target=block); thread.start(); thread.join()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); print(faults())"
    )
    # 2^27 bytes are 64 pages of 2 MiB, or 32,768 of 4 KiB; starting a thread takes a few.
    assert (int(output(code, environ)) < 32) == kept


def test_activations_are_counted_for_a_device():
    c = default.get_config()
    c.global_batch_size = 64
    one = cpu.activation_bytes(c)
    c.grad_accum_steps = 4
    assert cpu.activation_bytes(c) == one / 4
    c.global_batch_size *= 2
    assert cpu.activation_bytes(c) == one / 2
