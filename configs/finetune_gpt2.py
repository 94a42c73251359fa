"""Fine-tunes GPT-2 of any size on your own text, from OpenAI's weights.

    python -m jaxdp.train --config=configs/finetune_gpt2.py:124M --workdir=runs/finetuned \
        --config.data.path=FILE.txt

Sizes: 124M, 350M, 774M, 1558M, downloaded from the Hugging Face hub on first use. Batch size and
learning rate are from nanoGPT's finetune_shakespeare.py. It trains for up to ten times as many
steps, and stops when the validation loss no longer falls.
Expect: nanoGPT reports a loss of about 2.85 with 1558M, on Shakespeare's works. Ours is not yet
measured.
"""

from ml_collections import ConfigDict

from jaxdp.configs import gpt2

NAMES = {"124M": "gpt2", "350M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}


def get_config(size: str = "124M") -> ConfigDict:
    """Returns the config of a size, complete but for data.path."""
    c = gpt2.get_config(size)
    c.init_from = f"hf:{NAMES[size]}"
    c.data.path = ""
    c.tokenizer = f"hf:{NAMES[size]}"
    c.num_train_steps = 200
    c.global_batch_size = 32
    c.grad_accum_steps = 4
    c.eval_every = 5
    c.eval_max_batches = 0
    c.stop.patience = 4
    c.log_every = 1
    c.model.vocab_multiple = 1  # The vocabulary of OpenAI's weights is not padded.
    c.model.dropout = 0.1
    c.optimizer.learning_rate = 3e-5
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.checkpoint.every = 5
    c.checkpoint.keep_every = 0
    return c
