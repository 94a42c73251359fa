"""jaxdp: data-parallel training of Flax transformer language models."""

__version__ = "0.1.0"
