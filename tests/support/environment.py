"""What JAX reads from the environment when it is imported."""

import os
import tempfile
from importlib.metadata import version

# Nearly all of a small test's time is compilation. XLA ends the process at a flag it doesn't know.
FAST = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_prefer_vector_width=128"
)
if version("jaxlib").startswith("0.10."):
    FAST += " --xla_cpu_use_fusion_emitters=false"  # Halves the time; newer versions lack it.


def prepare() -> None:
    """Eight CPU devices; compiled programs shared by the session's processes; before `import jax`.

    The workers of pytest-xdist, and the commands that tests start, have this environment too.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if FAST not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST}".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name


PROGRAMS = tempfile.TemporaryDirectory(prefix="jaxdp-programs-")


def users_flags() -> str:
    """XLA_FLAGS as they were before."""
    return os.environ["XLA_FLAGS"].replace(FAST, "").strip()
