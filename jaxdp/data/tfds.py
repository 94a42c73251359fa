"""TFDS, imported here only, after TensorFlow.

While it is imported, what other threads import fails: it puts another `__import__` into builtins.
"""

from absl import logging

import jaxdp.data.tensorflow  # noqa: F401  Quietly, and without accelerators.
from jaxdp.common.errors import ConfigError, shown

_verbosity = logging.get_verbosity()
logging.set_verbosity(logging.FATAL)
try:
    import tensorflow_datasets as tfds

    # TFDS logs an error of its own imports and goes on without them. This raises it.
    import tensorflow_datasets.public_api  # noqa: F401
except Exception as error:  # Of any kind: a module is missing, or versions don't fit.
    raise ConfigError(
        "data.path=tfds:NAME needs tensorflow_datasets, which can't be imported "
        f"({type(error).__name__}: {shown(error, as_text=str)}): see to it with pip install "
        "--upgrade tensorflow-datasets protobuf"
    ) from error
finally:
    logging.set_verbosity(_verbosity)

__all__ = ["tfds"]
