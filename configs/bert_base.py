"""BERT base (12 layers x 768), trained on English Wikipedia with its masked-LM task.

    python -m jaxdp.train --config=configs/bert_base.py --workdir=runs/bert \
        --config.data.data_dir=TFDS_FOLDER

The model is transformers' BertForMaskedLM, with BERT's masking (15% of tokens: 80% of them masked,
10% random, 10% kept). As in RoBERTa there are no segments and no next-sentence task; the optimizer
is RoBERTa's, with a learning rate for this batch size. To start from BERT's weights:
--config.init_from=hf:bert-base-uncased --config.model.vocab_multiple=1
Expect: not yet measured.
"""

from ml_collections import ConfigDict

from jaxdp.configs import default


def get_config() -> ConfigDict:
    """Returns the config."""
    c = default.get_config()
    c.objective = "masked"
    c.data.path = "tfds:wikipedia/20230601.en"
    c.data.train_split = "train[:99%]"
    c.data.eval_split = "train[99%:]"
    c.tokenizer = "hf:bert-base-uncased"
    c.num_train_steps = 125_000
    c.global_batch_size = 512
    c.grad_accum_steps = 2
    c.seq_len = 512
    c.eval_every = 1000
    c.eval_max_batches = 20
    c.model.num_layers = 12
    c.model.num_heads = 12
    c.model.embed_dim = 768
    c.model.norm_position = "post"
    c.model.norm_epsilon = 1e-12
    c.model.activation = "gelu_exact"
    c.model.head_transform = True
    c.model.bias = True
    c.model.dropout = 0.1
    c.model.dtype = "bfloat16"
    c.model.vocab_multiple = 128
    c.optimizer.learning_rate = 2e-4
    c.optimizer.schedule = "linear"
    c.optimizer.warmup_steps = 10_000
    c.optimizer.final_fraction = 0.0
    c.optimizer.weight_decay = 0.01
    c.optimizer.b2 = 0.98
    c.checkpoint.every = 5000
    return c
