"""A small Llama (135 M parameters) on C4: the architecture and tokenizer of SmolLM-135M.

    python -m jaxdp.train --config=configs/llama_135m.py --workdir=runs/llama \
        --config.data.data_dir=TFDS_FOLDER

Rotary positions, RMSNorm, SwiGLU, 3 key/value heads for 9 heads, context 2,048. Batch (0.49 M
tokens) and schedule are the same as in gpt2_124m.py. To start from SmolLM's weights:
--config.init_from=hf:HuggingFaceTB/SmolLM-135M
Expect: not yet measured.
"""

from ml_collections import ConfigDict

from jaxdp.configs import gpt2_124m


def get_config() -> ConfigDict:
    """Returns the config."""
    c = gpt2_124m.get_config()
    c.tokenizer = "hf:HuggingFaceTB/SmolLM-135M"
    c.global_batch_size = 240
    c.seq_len = 2048
    c.model.num_layers = 30
    c.model.num_heads = 9
    c.model.num_kv_heads = 3
    c.model.embed_dim = 576
    c.model.mlp_dim = 1536
    c.model.positions = "rotary"
    c.model.norm = "rmsnorm"
    c.model.activation = "swiglu"
    return c
