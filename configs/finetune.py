"""Fine-tunes a model of Hugging Face's transformers on your own text.

    python -m jaxdp.train --config=configs/finetune.py:Qwen/Qwen3-0.6B --workdir=runs/finetuned \
        --config.data.path=FILE.txt

After the colon stands a name on the hub, or a folder; docs/huggingface.md lists the families. The
model's keys are read from its config.json, its tokenizer is used, and its context is shortened to
1,024 tokens. On GPUs, add --config.model.dtype=bfloat16. The run stops when the validation loss no
longer falls. To resume it, too, the model's config.json must be there.
Expect: depends on model and text.
"""

from ml_collections import ConfigDict

import jaxdp
from jaxdp.configs import default


def get_config(name: str = "") -> ConfigDict:
    """Returns the config for a model, complete but for data.path; name: on the hub, or a folder."""
    if not name:
        raise jaxdp.ConfigError(
            "configs/finetune.py names no model: write --config=configs/finetune.py:NAME, with a "
            "folder or a name on the Hugging Face hub"
        )
    c = default.get_config()
    c.init_from = c.tokenizer = f"hf:{name}"
    c.update_from_flattened_dict(jaxdp.model_keys(c.init_from))
    c.seq_len = min(c.seq_len, 1024)
    c.num_train_steps = 200
    c.global_batch_size = 32
    c.grad_accum_steps = 4
    c.eval_every = 20
    c.stop.patience = 3
    c.log_every = 1
    c.optimizer.learning_rate = 2e-5
    c.optimizer.warmup_steps = 10
    c.optimizer.b2 = 0.95
    c.checkpoint.every = 20
    return c
