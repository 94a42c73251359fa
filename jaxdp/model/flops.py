"""Floating-point operations of a model."""

from jaxdp.model.architecture import ModelConfig


def flops_per_token(config: ModelConfig, parameters: int) -> int:
    """Counts the floating-point operations of forward and backward pass per token.

    6 per parameter in matrix products, and 12 * context * (heads * head width) for each layer's
    attention, as if all tokens attended to all (PaLM, Chowdhery et al. 2022, appendix B), or to as
    many as its sliding window has.
    """
    if config.positions == "learned":
        parameters -= config.seq_len * config.embed_dim
    if not config.tied_head:
        parameters -= config.vocab_size * config.embed_dim  # A lookup multiplies nothing.
    if config.value_embeddings:
        table = config.vocab_size * config.num_kv_heads * config.head_dim
        parameters -= config.num_layers * table
    width = config.num_heads * config.head_dim
    seen = sum(min(window or config.seq_len, config.seq_len) for window in config.windows)
    return 6 * parameters + 12 * width * seen
