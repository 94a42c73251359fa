"""TensorFlow, imported here only: quietly, and kept off every accelerator.

Import it where it is needed, not at the top of a module: it takes seconds.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from jaxdp.common.errors import ConfigError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the terminal what C++ writes to stderr, unless the block fails.

    TensorFlow greets with lines about CPUs and missing GPUs that no log level silences. What Python
    writes there, another thread's error say, is still seen.
    """
    sys.stderr.flush()
    with os.fdopen(os.dup(2), "w", buffering=1) as terminal, tempfile.TemporaryFile() as said:
        seen = terminal if sys.stderr is sys.__stderr__ else sys.stderr
        os.dup2(said.fileno(), 2)
        try:
            with contextlib.redirect_stderr(seen):
                yield
        except BaseException:
            said.seek(0)
            os.write(terminal.fileno(), said.read())
            raise
        finally:
            os.dup2(terminal.fileno(), 2)


@contextlib.contextmanager
def _no_keras() -> Iterator[None]:
    """Keeps TensorFlow from importing Keras, a quarter of its import; who asks for it gets it."""
    name = "TF_USE_LEGACY_KERAS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"  # Another one, which isn't there: TensorFlow goes on without.
    try:
        yield
    finally:
        del os.environ[name]


def _keep_symbols_local() -> None:
    """Makes TensorFlow load its libraries for itself, not for all that is loaded after them.

    TensorFlow 2.20 and 2.21 load them with RTLD_GLOBAL. Triton, which PyTorch imports, then calls
    functions of TensorFlow's copy of LLVM instead of its own, and the process dies. TensorFlow uses
    RTLD_LOCAL where it has no module of this name, as in its later releases.
    """
    sys.modules.setdefault("tensorflow.python.pywrap_dlopen_global_flags", None)  # type: ignore


def hide_accelerators() -> None:
    """Leaves every accelerator to JAX.

    Raises:
      ConfigError: TensorFlow has started in this process with one; its memory can't be had back.
    """
    try:
        tf.config.set_visible_devices([], "GPU")
        tf.config.set_visible_devices([], "TPU")
    except RuntimeError as error:
        raise ConfigError(
            f"TensorFlow holds this process's accelerators already ({error}): restart it, and run "
            "tf.config.set_visible_devices([], 'GPU') before anything else of TensorFlow"
        ) from None


_keep_symbols_local()
with _quiet(), _no_keras():
    import tensorflow as tf

    hide_accelerators()
    tf.constant(0)  # Starts the runtime, which has something to say, too.

__all__ = ["tf"]
