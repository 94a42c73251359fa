"""A 6-layer transformer on the One Billion Word benchmark, the size of Flax's lm1b example.

    python -m jaxdp.train --config=configs/lm1b.py --workdir=runs/lm1b

TFDS downloads the corpus (1.7 GB) on first use. A BPE tokenizer of 30,000 tokens is trained on it.
Compare with runs that use other tokenizers by bits per byte, not by perplexity.
Expect: not yet measured.
"""

from ml_collections import ConfigDict

from jaxdp.configs import default


def get_config() -> ConfigDict:
    """Returns the config."""
    c = default.get_config()
    c.data.path = "tfds:lm1b"
    c.data.eval_split = "test"
    c.tokenizer = "train:bpe:30000"
    c.num_train_steps = 500_000
    c.global_batch_size = 256
    c.seq_len = 128
    c.eval_every = 1000
    c.eval_max_batches = 20
    c.log_every = 50
    c.model.num_layers = 6
    c.model.num_heads = 8
    c.model.embed_dim = 512
    c.model.dropout = 0.1
    c.model.dtype = "bfloat16"
    c.model.vocab_multiple = 128
    c.optimizer.learning_rate = 1.6e-3
    c.optimizer.warmup_steps = 1000
    c.optimizer.b2 = 0.98
    c.checkpoint.every = 10_000
    return c
