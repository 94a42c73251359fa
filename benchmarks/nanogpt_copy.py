"""Makes a copy of nanoGPT that trains with our text and our model's sizes."""

import pickle
import shutil
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxdp.data.cache import open_cache

COMMAND = ("train.py", "config/train_shakespeare_char.py")


def make(checkout: str, copy: Path, config: ConfigDict) -> list[str]:
    """Copies nanoGPT, with the tokens of a config as its character data set.

    Args:
      checkout: a checkout of nanoGPT; it is not changed.
      copy: the folder to create.
      config: the config of a character model.

    Returns:
      train.py and the arguments that make it train the same model on a CPU, from the copy.
    """
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git"))
    cache, data = open_cache(config), copy / "data" / "shakespeare_char"
    np.asarray(cache.train, np.uint16).tofile(data / "train.bin")
    np.asarray(cache.validation, np.uint16).tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": cache.vocab_size}))
    settings = {
        "device": "cpu",
        "block_size": config.seq_len,
        "batch_size": config.global_batch_size,
        "n_layer": config.model.num_layers,
        "n_head": config.model.num_heads,
        "n_embd": config.model.embed_dim,
        "dropout": config.model.dropout,
    }
    return [*COMMAND, *(f"--{key}={value}" for key, value in settings.items())]
