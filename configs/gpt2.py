"""GPT-2 as published, in its four sizes (124M, 350M, 774M, 1558M), trained as in gpt2_124m.py.

    python -m jaxdp.train --config=configs/gpt2.py:350M --workdir=runs/gpt2-350m \
        --config.data.data_dir=TFDS_FOLDER

Linear layers and norms have biases, unlike in gpt2_124m.py and nanoGPT. For the larger sizes raise
grad_accum_steps until a step fits into memory.
Expect: not yet measured.
"""

from ml_collections import ConfigDict

from jaxdp.configs import gpt2_124m

# Size -> layers, heads, width.
SIZES = {
    "124M": (12, 12, 768),
    "350M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}


def get_config(size: str = "124M") -> ConfigDict:
    """Returns the config of a size."""
    if size not in SIZES:
        raise ValueError(f"size {size!r} is none of {', '.join(SIZES)}")
    c = gpt2_124m.get_config()
    c.model.num_layers, c.model.num_heads, c.model.embed_dim = SIZES[size]
    c.model.bias = True
    return c
