"""A small GPT on the source of Python's standard library: no download, 2 minutes on 2 CPU cores.

    python -m jaxdp.train --config=configs/quickstart.py --workdir=runs/quickstart

Expect: validation loss 3.89, 1.57 bits per byte, on 34,208 tokens of held-out files (Python 3.11.7;
other versions have other files), in 1:48 from empty caches on 2 CPU cores (jax 0.10.2). With jax
0.12.0.1, Python 3.12.1 and one device: 1.61 bits per byte on that Python's files, in 3:43.
"""

from ml_collections import ConfigDict

from jaxdp.configs import default


def get_config() -> ConfigDict:
    """Returns the config."""
    c = default.get_config()
    c.data.path = "tfds:python_stdlib"
    c.tokenizer = "train:bpe:4096"
    c.num_train_steps = 1000
    c.global_batch_size = 8
    c.seq_len = 128
    c.log_every = 20
    c.eval_every = 250
    c.model.positions = "rotary"
    c.model.norm = "rmsnorm"
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 50
    c.checkpoint.every = 250
    c.sample.prompt = "class "
    return c
