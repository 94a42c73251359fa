import os

import pytest

from jaxdp.common import nvidia
from jaxdp.configs import default
from jaxdp.parallel import gpu


@pytest.fixture
def has_gpu(monkeypatch):
    """Shows a device file as NVIDIA's driver makes it."""
    monkeypatch.setattr(nvidia, "device_files", lambda: ["/dev/nvidia0"])


def flags_after(monkeypatch, given, config=None):
    monkeypatch.setenv("XLA_FLAGS", given)
    gpu.prepare(config or default.get_config())
    return os.environ["XLA_FLAGS"].split()


def test_without_a_gpu_nothing_is_set(monkeypatch):
    monkeypatch.setattr(nvidia, "device_files", lambda: [])
    assert flags_after(monkeypatch, "--xla_x=1") == ["--xla_x=1"]


def test_flags_that_xla_does_not_know_are_left_out(has_gpu, monkeypatch, tmp_path):
    known = next(iter(gpu.FLAGS))
    libraries = [tmp_path / "jaxlib.so", tmp_path / "plugin.so"]
    for file in libraries:
        file.write_bytes(b"\0" + known.encode() + b"\0")
    monkeypatch.setattr(gpu, "xla_libraries", lambda: libraries)
    assert flags_after(monkeypatch, "") == [f"--{known}={gpu.FLAGS[known]}"]
    # Both parts of XLA read the variable, and each ends the process at an unknown flag.
    libraries[1].write_bytes(b"something else")
    assert flags_after(monkeypatch, "") == []


def test_the_users_flags_and_the_config_go_first(has_gpu, monkeypatch, tmp_path):
    file = tmp_path / "xla.so"
    file.write_bytes(b" ".join(name.encode() for name in gpu.FLAGS))
    monkeypatch.setattr(gpu, "xla_libraries", lambda: [file, file])
    first, *others = gpu.FLAGS
    found = flags_after(monkeypatch, f"--{first}=7")
    assert found == [f"--{first}=7", *(f"--{name}={gpu.FLAGS[name]}" for name in others)]
    config = default.get_config()
    config.xla_flags = False
    assert flags_after(monkeypatch, "--xla_x=1", config) == ["--xla_x=1"]


@pytest.mark.parametrize(
    ("method", "dtype", "wanted"),
    [
        ("gradient_mean", "float32", False),
        ("gradient_mean", "int8", True),
        ("sharded", "int1", True),
        ("diloco", "int8", False),  # Gradients of an island are sent in float32.
    ],
)
def test_a_flag_is_for_gradients_in_few_bits_only(monkeypatch, tmp_path, method, dtype, wanted):
    file = tmp_path / "xla.so"
    file.write_bytes(b" ".join(name.encode() for name in gpu.FLAGS | gpu.OF_FEW_BITS))
    monkeypatch.setattr(gpu, "xla_libraries", lambda: [file, file])
    config = default.get_config()
    config.sync.method, config.sync.dtype = method, dtype
    assert (gpu.wanted(config).keys() >= gpu.OF_FEW_BITS.keys()) == wanted
