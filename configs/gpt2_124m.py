"""GPT-2 small (124 M parameters) on C4 with GPT-2's tokenizer, context 1,024, bfloat16.

    python -m jaxdp.train --config=configs/gpt2_124m.py --workdir=runs/gpt2 \
        --config.data.data_dir=TFDS_FOLDER

The batch, 480 sequences or 0.49 M tokens, and the schedule are from nanoGPT's train_gpt2.py;
grad_accum_steps suits 8 GPUs of 40 GB or more. TFDS must have prepared C4 before, which takes a
cluster. To use another corpus: --config.data.path=tfds:NAME.
Expect: nanoGPT publishes a validation loss of about 2.85 on OpenWebText. Ours is not yet measured.
"""

from ml_collections import ConfigDict

from jaxdp.configs import default


def get_config() -> ConfigDict:
    """Returns the config."""
    c = default.get_config()
    c.data.path = "tfds:c4/en"
    c.data.train_split = "train[:10%]"
    c.tokenizer = "hf:gpt2"
    c.num_train_steps = 600_000
    c.global_batch_size = 480
    c.grad_accum_steps = 5
    c.seq_len = 1024
    c.eval_every = 1000
    c.eval_max_batches = 20
    c.model.num_layers = 12
    c.model.num_heads = 12
    c.model.embed_dim = 768
    c.model.dtype = "bfloat16"
    c.model.vocab_multiple = 128
    c.optimizer.learning_rate = 6e-4
    c.optimizer.warmup_steps = 2000
    c.optimizer.b2 = 0.95
    c.checkpoint.every = 1000
    c.checkpoint.keep_every = 50_000
    return c
