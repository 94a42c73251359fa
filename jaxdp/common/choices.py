"""The allowed values of the config's keys, and of other numbers that the user gives."""

import math
import numbers
from typing import Any

from jaxdp.common.errors import ConfigError, shown

# The values of sync.dtype that compress what is sent, and how many values a number can take.
LEVELS = {"int8": 256, "int4": 16, "int2": 4, "ternary": 3, "int1": 2}
CHOICES = {
    "objective": ("causal", "masked"),
    "data.packing": ("stream", "documents", "padded"),
    "model.positions": ("learned", "rotary"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.norm_position": ("pre", "post"),
    "model.activation": ("gelu", "gelu_exact", "relu2", "swiglu"),
    "model.dtype": ("float32", "bfloat16"),
    "optimizer.name": ("adamw", "lion", "sgd", "muon"),
    "optimizer.schedule": ("cosine", "linear", "wsd", "constant"),
    "sync.method": ("gradient_mean", "parameter_mean", "diloco", "sharded", "fixed_order"),
    "sync.dtype": ("float32", "bfloat16", *LEVELS),
}

# Optimizers whose update of a weight matrix needs the whole matrix, not a slice of it.
NEEDS_FULL_MATRICES = ("muon",)

MAX_INT32 = 2**31 - 1  # The largest int32, which devices count with.
TEMPERATURE = 0.8  # Default sampling temperature, as in nanoGPT.

# Key -> (lowest, highest) allowed value, both included.
RANGES = {
    "seed": (0, MAX_INT32),
    "num_train_steps": (1, MAX_INT32),
    "num_epochs": (0, MAX_INT32),
    "global_batch_size": (1, MAX_INT32),
    "grad_accum_steps": (1, MAX_INT32),
    "loss_chunks": (1, MAX_INT32),
    "seq_len": (2, MAX_INT32),
    "log_every": (1, MAX_INT32),
    "eval_every": (1, MAX_INT32),
    "eval_max_batches": (0, MAX_INT32),
    "hang_seconds": (0, 10**9),
    "data.eval_fraction": (1e-6, 0.99),
    "model.num_layers": (1, 10_000),
    "model.num_heads": (1, 2**20),
    "model.num_kv_heads": (0, 2**20),
    "model.head_dim": (0, 2**20),
    "model.embed_dim": (1, 2**20),
    "model.mlp_dim": (0, 2**24),
    "model.rotary_base": (1, 1e12),
    "model.rotary_factor": (1, 1e6),
    "model.rotary_low": (1e-6, 1e6),
    "model.rotary_high": (1e-6, 1e6),
    "model.rotary_context": (1, MAX_INT32),
    "model.rotary_skip": (0, 10_000),
    "model.norm_epsilon": (1e-30, 1),
    "model.logit_cap": (0, 1e6),
    "model.mlp_lookback": (0, 64),
    "model.window": (0, MAX_INT32),
    "model.window_skip": (0, 10_000),
    "model.dropout": (0, 0.99),
    "model.attention_dropout": (0, 0.99),
    "model.vocab_multiple": (1, 2**20),
    "optimizer.learning_rate": (0, 1e6),
    "optimizer.warmup_steps": (0, MAX_INT32),
    "optimizer.final_fraction": (0, 1),
    "optimizer.decay_fraction": (0, 1),
    "optimizer.weight_decay": (0, 1e6),
    "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.999999),
    "optimizer.clip_norm": (0, 1e30),
    "sync.every": (1, MAX_INT32),
    "sync.after": (0, MAX_INT32),
    "sync.islands": (-1, MAX_INT32),
    "sync.fragments": (1, MAX_INT32),
    "sync.delay": (0, MAX_INT32),
    "sync.outer_learning_rate": (0, 1e6),
    "sync.outer_momentum": (0, 0.999999),
    "sync.virtual_replicas": (1, MAX_INT32),
    "sync.check_every": (0, MAX_INT32),
    "ema.decay": (0, 0.9999999),
    "divergence.max_bad_steps": (1, MAX_INT32),
    "divergence.spike_threshold": (0, 1e6),
    "divergence.max_rollbacks": (0, MAX_INT32),
    "stop.patience": (0, MAX_INT32),
    "stop.min_delta": (0, 1e6),
    "checkpoint.every": (1, MAX_INT32),
    "checkpoint.keep_last": (1, MAX_INT32),
    "checkpoint.keep_every": (0, MAX_INT32),
    "sample.num_tokens": (0, MAX_INT32),
    "profile.start_step": (0, MAX_INT32),
    "profile.num_steps": (0, MAX_INT32),
}

# Option of generate and plan, as a flag or an argument -> (lowest, highest) allowed value, both
# included; None: any. Where the lowest is an int, the value is one.
OPTIONS: dict[str, tuple[Any, Any]] = {
    "num_tokens": (1, MAX_INT32),
    "temperature": (0.0, None),
    "top_k": (0, None),
    "top_p": (1e-6, 1.0),
    "seed": (0, MAX_INT32),
    "devices": (1, MAX_INT32),
    "hosts": (1, MAX_INT32),
    "bandwidth_gbps": (1e-6, None),
    "inside_bandwidth_gbps": (1e-6, None),
    "latency_us": (0.0, None),
    "tflops": (1e-6, None),
    "mfu": (1e-6, 1.0),
    "memory_gib": (1e-6, None),
    "vocab_size": (1, MAX_INT32),
}

# Keys of IDENTITY that the config.json of an older version lacks; it behaved as their defaults.
NEW_KEYS = (
    "init_from",
    "model.head_dim",
    "model.rotary_base",
    "model.rotary_factor",
    "model.rotary_low",
    "model.rotary_high",
    "model.rotary_context",
    "model.rotary_skip",
    "model.norm_position",
    "model.norm_epsilon",
    "model.head_transform",
    "model.qk_norm",
    "model.qkv_bias",
    "model.zero_init",
    "model.logit_cap",
    "model.embed_residual",
    "model.value_embeddings",
    "model.mlp_lookback",
    "model.window",
    "model.window_skip",
    "model.attention_dropout",
)


def check_options(**given: Any) -> None:
    """Raises ConfigError for a value that OPTIONS doesn't allow, or that is no finite number."""
    for name, value in given.items():
        low, high = OPTIONS[name]
        kind = numbers.Integral if type(low) is int else numbers.Real
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not (fits and low <= value < math.inf and (high is None or value <= high)):
            one = "an integer" if type(low) is int else "a number"
            most = "" if high is None else f" to {high}"
            raise ConfigError(
                f"--{name}={shown(value)} is not allowed: give {one} from {low}{most}"
            )
