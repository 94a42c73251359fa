"""A small GPT on the source of Python's standard library: no download, 2 minutes on 2 CPU cores.

    python -m jaxdp.train --config=configs/quickstart.py --workdir=runs/quickstart

Rotary positions, SwiGLU, QK-norm and Muon; with AdamW and GELU, as many parameters and tokens end
at 1.62 bits per byte (docs/recipes.md).
Expect: validation loss 3.75, 1.45 bits per byte, on 28,688 tokens of held-out files (Python
3.11.7), in 2 to 4 minutes from empty caches on 2 CPU cores. Other versions have other files: 2.64M
training and 28.7k validation tokens in 3.11.7, 2.48M and 31.7k in 3.12.1, where it ended at 1.48
bits per byte, 2.44M and 28.4k in 3.13.0, where it ended at 1.52.
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
    c.model.activation = "swiglu"
    c.model.mlp_dim = 344  # 8/3 of 128: as many parameters as GELU's 4 x 128.
    c.model.qk_norm = True
    c.model.zero_init = True
    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 6e-3
    c.optimizer.schedule = "linear"
    c.optimizer.final_fraction = 0.0
    c.optimizer.warmup_steps = 50
    c.checkpoint.every = 250
    c.sample.prompt = "def "
    return c
