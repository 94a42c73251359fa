"""TensorFlow and TFDS, imported here only: quietly, and kept off every accelerator.

Import it where it is needed, not at the top of a module: it takes seconds.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from jaxdp.config import ConfigError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the terminal what C++ writes to stderr, unless the block fails.

    TensorFlow greets with lines about CPUs and missing GPUs that no log level silences.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(saved, said.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


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


with _quiet():
    import tensorflow as tf
    import tensorflow_datasets as tfds

    hide_accelerators()
    tf.constant(0)  # Starts the runtime, which has something to say, too.

__all__ = ["tf", "tfds"]
