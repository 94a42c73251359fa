"""Imports TensorFlow for the whole package: quietly, and kept off every accelerator.

Import this inside functions, not at the top of a module: it takes seconds.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from jaxdp.common.errors import ConfigError
from jaxdp.common.streams import hidden

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if not os.path.isabs(os.path.expanduser("~")):  # TensorFlow's Keras would make a folder called ~.
    os.environ.setdefault("KERAS_HOME", os.path.join(tempfile.gettempdir(), ".keras"))


# What TensorFlow's C++ says at every start, about CPUs and missing GPUs; no log level silences it.
GREETINGS = (
    "before absl::InitializeLog() is called",
    "oneDNN custom operations are on",
    "Could not find cuda drivers",
    "failed call to cuInit",
    "This TensorFlow binary is optimized",
    "To enable the following instructions:",
    "Attempting to register factory for plugin",
    "computation placer already registered",
    "TF-TRT Warning",
    "Cannot dlopen some GPU libraries",
    "Skipping registering GPU devices",
)


@contextlib.contextmanager
def _no_keras() -> Iterator[None]:
    """Stops TensorFlow from importing Keras, which takes a quarter of its import time.

    An attribute that needs Keras still imports it on first use.
    """
    name = "TF_USE_LEGACY_KERAS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"  # Selects a Keras that isn't installed: TensorFlow goes on without.
    try:
        yield
    finally:
        del os.environ[name]


def _keep_symbols_local() -> None:
    """Makes TensorFlow load its libraries with RTLD_LOCAL, so that others don't see their symbols.

    TensorFlow 2.20 and 2.21 use RTLD_GLOBAL. Triton, which PyTorch imports, then calls functions of
    TensorFlow's copy of LLVM instead of its own, and the process dies. TensorFlow uses RTLD_LOCAL
    if it can't import the module below, which later releases don't have.
    """
    sys.modules.setdefault("tensorflow.python.pywrap_dlopen_global_flags", None)  # type: ignore


def hide_accelerators() -> None:
    """Hides every accelerator from TensorFlow, to leave them to JAX.

    Raises:
      ConfigError: TensorFlow already uses one in this process, and can't give its memory back.
    """
    try:
        tf.config.set_visible_devices([], "GPU")
        tf.config.set_visible_devices([], "TPU")
    except RuntimeError as error:
        raise ConfigError(
            f"TensorFlow holds this process's accelerators already ({error}): restart it, and call "
            "tf.config.set_visible_devices([], 'GPU') before anything else of TensorFlow"
        ) from None


_keep_symbols_local()
with hidden(GREETINGS), _no_keras():
    import tensorflow as tf

    hide_accelerators()
    tf.constant(0)  # Starts the runtime, which prints lines, too.

__all__ = ["tf"]
