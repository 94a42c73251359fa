"""TensorFlow and TFDS, imported here only: quietly, and kept off every accelerator.

Import it where it is needed, not at the top of a module: it takes seconds.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

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


with _quiet():
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")
    tf.constant(0)  # Starts the runtime, which has something to say, too.

__all__ = ["tf", "tfds"]
