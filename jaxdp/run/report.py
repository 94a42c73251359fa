"""A run in words: its header, its evaluations, its summary."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdp.common.config import BatchSizes
from jaxdp.common.terminal import duration, quantity
from jaxdp.data import feed, mixture, pipeline
from jaxdp.data.cache import TokenCache
from jaxdp.data.eval_sets import Split
from jaxdp.data.sequences import Examples
from jaxdp.data.sequences import keys as sequence_keys
from jaxdp.model import attention
from jaxdp.model.transformer import ModelConfig, flops_per_token, num_parameters
from jaxdp.parallel.replicas import Replicas
from jaxdp.run.early_stopping import Stopping
from jaxdp.run.evaluation import Evaluation
from jaxdp.step.program import Program
from jaxdp.sync.traffic import Collective, sent_per_step


def header(
    config: ConfigDict,
    workdir: Path,
    replicas: Replicas,
    sizes: BatchSizes,
    cache: TokenCache,
    sets: Mapping[str, Split],
    params: Any,
) -> dict[str, str]:
    """What a user wants to see before anything is trained."""
    per_step = sizes.global_ * config.seq_len
    tokens = per_step * config.num_train_steps
    parameters = num_parameters(params)
    flops = flops_per_token(ModelConfig.from_config(config, cache.vocab_size), parameters) * tokens
    processes = jax.process_count()
    epoch = pipeline.epoch_length(feed.sequences(config, cache, "train"))
    return {
        "devices": f"{replicas.device_count} x {replicas.devices[0].device_kind} in {processes} "
        + ("process" if processes == 1 else "processes"),
        "batch": f"{sizes.global_} sequences x {config.seq_len} tokens = {per_step:,} a step",
        "": f"(per host {sizes.per_host}, per device {sizes.per_device}, micro {sizes.micro})",
        "parameters": f"{quantity(parameters)}, computed with in {config.model.dtype}"
        + (f"; evaluated: their EMA, decay {config.ema.decay:g}" if config.ema.decay else ""),
        "attention": f"by {_kernel(config)}",
        "data": f"{config.data.path}, {quantity(len(cache.train))} training and "
        f"{quantity(len(cache.validation))} validation tokens",
        "vocabulary": f"{cache.vocab_size:,} tokens ({config.tokenizer})",
        "training": f"{config.num_train_steps:,} steps, {quantity(tokens)} tokens "
        f"({sizes.global_ * config.num_train_steps / epoch:.2f} epochs), {flops:.2g} FLOPs",
        "workdir": str(workdir),
        **_sources(config, cache),
        **_examples(config, cache),
        **_eval_sets(sets),
    }


def _eval_sets(sets: Mapping[str, Split]) -> dict[str, str]:
    return {
        f"eval set {name}": f"{split.config.data.path}, {quantity(len(split.cache.validation))} "
        "tokens"
        for name, split in sets.items()
    }


def _kernel(config: ConfigDict) -> str:
    """What computes attention in training."""
    masked = "segments" in sequence_keys(config.objective, config.data.packing)
    model = config.model
    found = attention.kernel(model.dtype, model.embed_dim // model.num_heads, masked)
    return {"cudnn": "cuDNN's fused kernel", "xla": "XLA"}[found]


def _sources(config: ConfigDict, cache: TokenCache) -> dict[str, str]:
    """Those of a mixture: their share, and how often each is gone through."""
    found = feed.sequences(config, cache, "train")
    shares, first = mixture.parse(config.data.path), 0
    rows: dict[str, str] = {}
    if len(shares) == 1:
        return {}
    for (path, share), end, part in zip(
        shares.items(), cache.train_borders, found.parts, strict=True
    ):
        part_of_all = share / sum(shares.values())
        taken = config.num_train_steps * config.global_batch_size * part_of_all
        rows[f"source {len(rows) + 1}"] = (
            f"{part_of_all:.2%} {path}, {quantity(end - first)} tokens, "
            f"{taken / part.count:.2f} epochs"
        )
        first = end
    return rows


def _examples(config: ConfigDict, cache: TokenCache) -> dict[str, str]:
    """What becomes of the examples of data.packing="padded"."""
    rows = {}
    for split, index in cache.examples.items():
        found = feed.sequences(config, cache, split)
        assert isinstance(found, Examples)
        rows[f"{split} examples"] = (
            f"{len(index):,}, of which {found.cut:,} are cut to seq_len={config.seq_len}, and "
            f"{len(index) - found.total:,} left out as nothing remains to predict"
        )
    return rows


def in_words(evaluation: Evaluation) -> str:
    """An evaluation in short."""
    return (
        f"loss {evaluation.loss:.4f}  perplexity {evaluation.perplexity:.2f}  "
        f"bits/byte {evaluation.bits_per_byte:.4f}  ({evaluation.tokens:,} tokens)"
    )


def evaluated(step: int, evaluation: Evaluation, name: str = "") -> str:
    """An evaluation of the validation split, or of the set of that name, in a line."""
    of = f" of {name}" if name else ""
    return f"evaluation{of} at step {step}: {in_words(evaluation)}"


def already_finished(step: int, stopping: Stopping) -> str:
    """What to say where there is nothing to do."""
    if stopping.over:
        return (
            f"Already finished: stopped early after step {step:,}, for {stopping.reason()}. To "
            "train on, raise stop.patience, or set it to 0."
        )
    return f"Already finished: all {step:,} steps are done. To train on, raise num_train_steps."


def summary(config: ConfigDict, workdir: Path, result: Any, seconds: float) -> dict[str, str]:
    """What was reached, and where everything lies."""
    rows = {
        "steps": f"{result.step:,} of {config.num_train_steps:,}, in {duration(seconds)}",
        "checkpoints": str(workdir / "checkpoints"),
        "metrics": str(workdir / "metrics.jsonl"),
        "curves": f"tensorboard --logdir {workdir}",
    }
    for name, evaluation in result.evaluations.items():
        rows[f"{name or 'validation'} loss"] = in_words(evaluation).removeprefix("loss ")
    if config.objective == "causal":
        rows["more text"] = f"python -m jaxdp.generate --workdir={workdir} --prompt=TEXT"
    return rows


def traffic(config: ConfigDict, round_: list[Collective], count: int) -> dict[str, str]:
    """What agreement sends, by the definition of the method."""
    if count == 1:
        return {"synchronised": f"nothing: one device (sync.method={config.sync.method})"}
    payload, sent = sum(c.bytes for c in round_), sent_per_step(round_, count)
    per_token = sent / (config.global_batch_size * config.seq_len / count)
    steps = round_[0].steps
    when = f"every {steps} steps" if steps > 1 else "per step"
    rounded = "" if config.sync.dtype == "float32" else f", rounded to {config.sync.dtype}"
    return {
        "synchronised": f"{config.sync.method}{rounded}, {_kinds(round_)} {when}, of "
        f"{quantity(payload)}B; on a ring a device sends {quantity(sent)}B a step, "
        f"{per_token:,.0f} bytes for each token"
    }


def collectives(program: Program) -> str:
    """Those of the compiled training step, counted."""
    found = list((program.collectives or {}).values())
    if not found:
        return "no collectives"
    return f"{_kinds(found)}, {quantity(sum(c.bytes for c in found))}B together"


def _kinds(found: list[Collective]) -> str:
    counts = Counter(c.kind for c in found)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def agreement(program: Program, state: Any, count: int) -> dict[str, str]:
    """What agreement cost."""
    rows = traffic(program.config, program.traffic(state), count)
    if count == 1:
        return rows
    if program.collectives:
        rows["collectives"] = f"{collectives(program)}, in the compiled program"
    if program.waiting is not None:
        rows["waiting"] = f"{program.waiting:.1%} of the devices' time in collectives, as profiled"
    if program.drift is not None:
        rows["drift"] = f"{program.drift:.2e} of the parameters' norm, before the last agreement"
    return rows


def diagnosis(found: dict[str, Any]) -> dict[str, str]:
    """What is known of a step at which a run diverges; see `divergence.diagnose`."""
    positions = found["sequences_begin_at_tokens"]
    first = ", ".join(f"{position:,}" for position in positions[:8])
    more = f", and {len(positions) - 8} more" if len(positions) > 8 else ""
    rows = {
        "step": f"{found['step']:,}, loss {found['loss']:.4g}",
        "batch": f"sequences from tokens {first}{more} of the training split",
    }
    for layer, norm in found["norms"].items():
        rows[layer] = f"parameters {norm['parameters']:.4g}, gradient {norm['gradient']:.4g}"
    return rows
