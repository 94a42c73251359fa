"""nanoGPT's character model for one GPU: 6 layers x 384, context 256, batch 64, 5,000 steps.

    python -m jaxdp.train --config=configs/shakespeare_char.py --workdir=runs/char \
        --config.data.path=tinyshakespeare.txt

The data is the 1.1 MB of Shakespeare that nanoGPT's data/shakespeare_char/prepare.py downloads.
Expect: with model.dtype=bfloat16 a validation loss of 1.4635 at step 1,500, the best, measured on
one H100. nanoGPT publishes 1.4697 (its best, on random batches). 2 CPU cores take about a day.
"""

from ml_collections import ConfigDict

from jaxdp.configs import default


def get_config() -> ConfigDict:
    """Returns the config, complete but for data.path."""
    c = default.get_config()
    c.num_train_steps = 5000
    c.global_batch_size = 64
    c.seq_len = 256
    c.tokenizer = "char"
    c.model.num_layers = 6
    c.model.num_heads = 6
    c.model.embed_dim = 384
    c.model.dropout = 0.2
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.b2 = 0.99
    c.checkpoint.every = 250
    c.sample.num_tokens = 500
    return c
