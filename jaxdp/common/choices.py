"""The allowed values of the config's keys."""

CHOICES = {
    "objective": ("causal", "masked"),
    "data.packing": ("stream", "documents", "padded"),
    "model.positions": ("learned", "rotary"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.norm_position": ("pre", "post"),
    "model.activation": ("gelu", "gelu_exact", "swiglu"),
    "model.dtype": ("float32", "bfloat16"),
    "optimizer.name": ("adamw", "lion", "sgd", "muon"),
    "optimizer.schedule": ("cosine", "linear", "wsd", "constant"),
    "sync.method": ("gradient_mean", "parameter_mean", "diloco", "sharded", "fixed_order"),
    "sync.dtype": ("float32", "bfloat16"),
}

# Optimizers whose update of a weight matrix needs the whole matrix, not a slice of it.
WHOLE_MATRICES = ("muon",)

MOST = 2**31 - 1  # The largest int32, which devices count with.
TEMPERATURE = 0.8  # Default sampling temperature, as in nanoGPT.

# Key -> (lowest, highest) allowed value, both included.
RANGES = {
    "seed": (0, MOST),
    "num_train_steps": (1, MOST),
    "num_epochs": (0, MOST),
    "global_batch_size": (1, MOST),
    "grad_accum_steps": (1, MOST),
    "loss_chunks": (1, MOST),
    "seq_len": (2, MOST),
    "log_every": (1, MOST),
    "eval_every": (1, MOST),
    "eval_max_batches": (0, MOST),
    "hang_seconds": (0, 10**9),
    "data.eval_fraction": (1e-6, 0.99),
    "model.num_layers": (1, 10_000),
    "model.num_heads": (1, 2**20),
    "model.num_kv_heads": (0, 2**20),
    "model.embed_dim": (1, 2**20),
    "model.mlp_dim": (0, 2**24),
    "model.rotary_base": (1, 1e12),
    "model.norm_epsilon": (1e-30, 1),
    "model.dropout": (0, 0.99),
    "model.vocab_multiple": (1, 2**20),
    "optimizer.learning_rate": (0, 1e6),
    "optimizer.warmup_steps": (0, MOST),
    "optimizer.final_fraction": (0, 1),
    "optimizer.decay_fraction": (0, 1),
    "optimizer.weight_decay": (0, 1e6),
    "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.999999),
    "optimizer.clip_norm": (0, 1e30),
    "sync.every": (1, MOST),
    "sync.after": (0, MOST),
    "sync.outer_learning_rate": (0, 1e6),
    "sync.outer_momentum": (0, 0.999999),
    "sync.virtual_replicas": (1, MOST),
    "sync.check_every": (0, MOST),
    "ema.decay": (0, 0.9999999),
    "divergence.max_bad_steps": (1, MOST),
    "divergence.spike_threshold": (0, 1e6),
    "divergence.max_rollbacks": (0, MOST),
    "stop.patience": (0, MOST),
    "stop.min_delta": (0, 1e6),
    "checkpoint.every": (1, MOST),
    "checkpoint.keep_last": (1, MOST),
    "checkpoint.keep_every": (0, MOST),
    "sample.num_tokens": (0, MOST),
    "profile.start_step": (0, MOST),
    "profile.num_steps": (0, MOST),
}

# Keys of IDENTITY that the config.json of an older version lacks; it behaved as their defaults.
ADDED = (
    "init_from",
    "model.rotary_base",
    "model.norm_position",
    "model.norm_epsilon",
    "model.head_transform",
)
