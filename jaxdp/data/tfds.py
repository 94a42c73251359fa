"""Imports TFDS for the whole package, after TensorFlow.

Other threads must not import anything meanwhile: TFDS replaces `builtins.__import__` for the time.
"""

from absl import logging

import jaxdp.data.tensorflow  # noqa: F401  Imports TensorFlow quietly, without accelerators.
from jaxdp.common.errors import ConfigError, shown

_verbosity = logging.get_verbosity()
logging.set_verbosity(logging.FATAL)
try:
    import tensorflow_datasets as tfds

    # TFDS logs an error in its own imports and goes on without them. This import raises it.
    import tensorflow_datasets.public_api  # noqa: F401
except Exception as error:  # A missing module or clashing versions can raise anything.
    raise ConfigError(
        "data.path=tfds:NAME needs tensorflow_datasets, which can't be imported "
        f"({type(error).__name__}: {shown(error, as_text=str)}): repair it with pip install "
        "--upgrade tensorflow-datasets protobuf"
    ) from error
finally:
    logging.set_verbosity(_verbosity)

__all__ = ["tfds"]
