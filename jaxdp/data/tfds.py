"""TFDS, imported here only, after TensorFlow.

While it is imported, what other threads import fails: it puts another `__import__` into builtins.
"""

import jaxdp.data.tensorflow  # noqa: F401, I001  Quietly, and without accelerators.
import tensorflow_datasets as tfds

__all__ = ["tfds"]
