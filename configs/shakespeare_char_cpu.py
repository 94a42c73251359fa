"""nanoGPT's character model for CPUs: 4 layers x 128, context 64, batch 12, 2,000 steps.

    python -m jaxdp.train --config=configs/shakespeare_char_cpu.py --workdir=runs/char_cpu \
        --config.data.path=tinyshakespeare.txt

The data is the 1.1 MB of Shakespeare that nanoGPT's data/shakespeare_char/prepare.py downloads.
Expect: validation loss 1.78 over the entire validation split, in under 2 minutes on 2 CPU cores.
nanoGPT publishes 1.88 for this model and budget, estimated on random batches. With nanoGPT's
learning rate of 1e-3, jaxdp reaches 1.906 and nanoGPT 1.904, each the mean of six seeds over the
entire split (benchmarks/parity.py); seeds are up to 0.024 apart. 3e-3 is better for a model this
small and a run this short.
"""

from ml_collections import ConfigDict

from jaxdp.configs import default


def get_config() -> ConfigDict:
    """Returns the config, complete but for data.path."""
    c = default.get_config()
    c.num_train_steps = 2000
    c.global_batch_size = 12
    c.seq_len = 64
    c.tokenizer = "char"
    c.model.num_layers = 4
    c.model.num_heads = 4
    c.model.embed_dim = 128
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.b2 = 0.99
    c.sample.num_tokens = 500
    return c
