"""TODO."""

from ml_collections import ConfigDict

from jaxdp.configs import default


def get_config() -> ConfigDict:
    """Returns the config."""
    c = default.get_config()
    c.data.path = "tfds:python_stdlib"
    c.tokenizer = "train:bpe:2048"
    c.num_train_steps = 40
    c.eval_every = 20
    c.optimizer.warmup_steps = 5
    c.checkpoint.every = 20
    c.seq_len = 128
    return c
