"""Texts and tables about a run: its header, evaluations, and summary."""

import importlib.util
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdp.common.terminal import duration, in_bytes, quantity
from jaxdp.data import pipeline, special_tokens
from jaxdp.data.batch import token_keys
from jaxdp.data.feed import Feed
from jaxdp.data.sequences import Examples
from jaxdp.model import attention
from jaxdp.model.flops import flops_per_token
from jaxdp.model.target import target
from jaxdp.model.transformer import num_parameters, parameter_shapes
from jaxdp.run.early_stopping import EarlyStopping
from jaxdp.run.evaluation import Evaluation
from jaxdp.step import optimizer
from jaxdp.step.program import Program
from jaxdp.step.setup import Setup
from jaxdp.sync.traffic import Collective, sent_per_step


def header(setup: Setup, workdir: Path, device_kind: str) -> dict[str, str]:
    """Returns the table that is shown before training."""
    config, sizes, cache = setup.config, setup.sizes, setup.feed.cache
    per_step = sizes.global_ * config.seq_len
    total = setup.feed.position(config.num_train_steps).total
    tokens = total * config.seq_len
    parameters = num_parameters(parameter_shapes(setup.model))
    flops = flops_per_token(setup.model.config, parameters) * tokens
    processes = jax.process_count()
    epochs = total / pipeline.epoch_length(setup.feed.training)
    return {
        "devices": f"{setup.device_count} x {device_kind} in {processes} "
        + ("process" if processes == 1 else "processes"),
        "batch": f"{sizes.global_} sequences x {config.seq_len} tokens = {per_step:,} a step",
        "": f"(per host {sizes.per_host}, per device {sizes.per_device}, micro {sizes.micro})",
        "parameters": f"{quantity(parameters)}, computed with in {_arithmetic(config.model.dtype)}"
        + (f"; evaluated: their EMA, decay {config.ema.decay:g}" if config.ema.decay else ""),
        "attention": f"by {_kernel(config, setup.model.config.head_dim)}",
        "data": f"{config.data.path}, {quantity(len(cache.train))} training and "
        f"{quantity(len(cache.validation))} validation tokens",
        "vocabulary": f"{cache.vocab_size:,} tokens ({config.tokenizer})",
        "documents": _ends(setup.feed),
        "training": f"{config.num_train_steps:,} steps, {quantity(tokens)} tokens "
        f"({epochs:.2f} epochs), {flops:.2g} FLOPs",
        "optimizer": optimizer.describe(config),
        "evaluation": _evaluation(setup.feed),
        "workdir": str(workdir),
        **_sources(setup.feed),
        **_examples(setup.feed),
        **_eval_sets(setup.feeds),
        **_warnings(setup.feeds),
    }


def _evaluation(feed: Feed) -> str:
    """Says when and on what the loss is evaluated, and explains bits/byte where that is given."""
    c, part = feed.config, "the whole validation split"
    if c.eval_max_batches:
        part = f"{c.eval_max_batches:,} batches of the validation split"
    hint = "; bits/byte is the loss in bits per byte of text, comparable between tokenizers"
    return f"every {c.eval_every:,} steps, on {part}" + (hint if feed.tokens_per_byte else "")


def _ends(feed: Feed) -> str:
    """Says which tokens begin and end a document."""
    words = feed.cache.tokenizer
    begin, end = special_tokens.begin_id(words), special_tokens.end_id(words)
    begins = "" if begin is None else f"begin with {special_tokens.named(words, begin)}, "
    if end is None:
        return f"{begins}no token ends them: the tokenizer has none, or data.eos has to name it"
    return f"{begins}end with {special_tokens.named(words, end)}"


def _warnings(feeds: Mapping[str, Feed]) -> dict[str, str]:
    """Returns a row for each warning about the text of a run or of an eval set."""
    found = [
        f"eval set {name}: {warning}" if name else warning
        for name, feed in feeds.items()
        for warning in feed.cache.warnings
    ]
    return {f"warning {number}": warning for number, warning in enumerate(found, 1)}


def _arithmetic(dtype: str) -> str:
    """Returns the dtype of computation, and what the device makes of it in matrix products."""
    precision = jax.config.values["jax_default_matmul_precision"] or "default"
    shortened = dtype == "float32" and target().capability >= 8 and precision == "default"
    return f"{dtype}, with products in TF32" if shortened else dtype


def _eval_sets(feeds: Mapping[str, Feed]) -> dict[str, str]:
    return {
        f"eval set {name}": f"{feed.config.data.path}, {quantity(len(feed.cache.validation))} "
        "tokens"
        for name, feed in feeds.items()
        if name
    }


def _kernel(config: ConfigDict, width: int) -> str:
    """Returns the name of the kernel that computes attention in training."""
    masked = "segments" in token_keys(config.objective, config.data.packing)
    dropout = config.model.attention_dropout > 0
    found = attention.kernel(config.model.dtype, width, masked, dropout, config.model.window)
    return {
        "cudnn": "cuDNN's fused kernel",
        "packed": "jaxdp's fused kernel for separate documents",
        "xla": "XLA",
    }[found]


def _sources(feed: Feed) -> dict[str, str]:
    """Returns a row for each source of a mixture: its share, tokens, and epochs."""
    shares, first = sum(feed.shares.values()), 0
    taken = feed.position(feed.config.num_train_steps).taken
    rows: dict[str, str] = {}
    if len(feed.shares) == 1:
        return {}
    for (path, share), end, part, count in zip(
        feed.shares.items(), feed.cache.train_borders, feed.training.parts, taken, strict=True
    ):
        rows[f"source {len(rows) + 1}"] = (
            f"{share / shares:.2%} {path}, {quantity(end - first)} tokens, "
            f"{count / part.count:.2f} epochs"
        )
        first = end
    return rows


def _examples(feed: Feed) -> dict[str, str]:
    """Returns rows that count the examples of data.packing="padded": all, cut, and left out."""
    rows = {}
    sequences = {"train": feed.training, "validation": feed.validation}
    for split, index in feed.cache.examples.items():
        found = sequences[split]
        assert isinstance(found, Examples)
        rows[f"{split} examples"] = (
            f"{len(index):,}, of which {found.cut:,} are cut to seq_len={feed.config.seq_len}, "
            f"and {len(index) - found.total:,} left out as nothing remains to predict"
        )
    return rows


def in_words(evaluation: Evaluation) -> str:
    """Formats an evaluation in short."""
    bits = evaluation.bits_per_byte
    return (
        f"loss {evaluation.loss:.4f}  perplexity {evaluation.perplexity:.2f}  "
        + (f"bits/byte {bits:.4f}  " if bits is not None else "")
        + f"({evaluation.tokens:,} tokens)"
    )


def evaluated(step: int, evaluation: Evaluation, name: str = "") -> str:
    """Formats a line about an evaluation; `name` is the eval set, "" the validation split."""
    of = f" of {name}" if name else ""
    return f"evaluation{of} at step {step}: {in_words(evaluation)}"


def already_finished(config: ConfigDict, step: int, stopping: EarlyStopping) -> str:
    """Says why there is nothing left to train, and how to train on."""
    if stopping.over:
        return (
            f"Already finished: stopped early after step {step:,}, for {stopping.reason()}. To "
            "train on, raise stop.patience, or set it to 0."
        )
    key = "num_epochs" if config.num_epochs else "num_train_steps"
    return f"Already finished: all {step:,} steps are done. To train on, raise {key}."


def summary(config: ConfigDict, workdir: Path, result: Any, seconds: float) -> dict[str, str]:
    """Returns the table that is shown at the end: steps, losses, and where the files are."""
    rows = {
        "steps": f"{result.step:,} of {config.num_train_steps:,}, in {duration(seconds)}",
        "checkpoints": str(workdir / "checkpoints"),
        "metrics": str(workdir / "metrics.jsonl"),
        **_curves(workdir),
    }
    for name, evaluation in result.evaluations.items():
        rows[f"{name or 'validation'} loss"] = in_words(evaluation).removeprefix("loss ")
    if config.objective == "causal":
        prompt = config.sample.prompt
        shown = shlex.quote(prompt) if prompt.isprintable() else f"${prompt!r}"
        asking = "--chat" if config.data.messages_key else f"--prompt={shown}"
        rows["more text"] = f"{_command('generate')} --workdir={_quoted(workdir)} {asking}"
    return rows


def _curves(workdir: Path) -> dict[str, str]:
    """Returns a row with a command that shows the curves, if what it needs is installed."""
    if importlib.util.find_spec("matplotlib"):
        return {"curves": f"{_command('plot')} {_quoted(workdir)} --output=plot.png"}
    if importlib.util.find_spec("tensorboard"):
        main = f"{_quoted(sys.executable)} -m tensorboard.main"
        return {"curves": f"{main} --logdir={_quoted(workdir)}"}
    return {}


def _command(name: str) -> str:
    """Returns a shell command that runs a command of jaxdp with this interpreter."""
    return f"{_quoted(sys.executable)} -m jaxdp.{name}"


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(path))


def traffic(config: ConfigDict, round_: list[Collective], count: int) -> dict[str, str]:
    """Returns a row about what synchronisation sends, by the definition of the method."""
    if count == 1:
        return {"synchronised": f"nothing: one device (sync.method={config.sync.method})"}
    payload, sent = sum(c.bytes for c in round_), sent_per_step(round_, count)
    per_token = sent / (config.global_batch_size * config.seq_len / count)
    steps = round_[0].steps
    when = f"every {steps} steps" if steps > 1 else "per step"
    rounded = "" if config.sync.dtype == "float32" else f", rounded to {config.sync.dtype}"
    fragments = config.sync.fragments
    part = f", one of {fragments} fragments at a time" if fragments > 1 else ""
    return {
        "synchronised": f"{config.sync.method}{rounded}{part}, {_kinds(round_)} {when}, of "
        f"{in_bytes(payload)}; on a ring a device sends {in_bytes(sent)} a step, "
        f"{per_token:,.0f} bytes for each token"
    }


def collectives(program: Program) -> str:
    """Counts the collectives of the compiled training step, in words."""
    found = list((program.collectives or {}).values())
    if not found:
        return "no collectives"
    return f"{_kinds(found)}, {in_bytes(sum(c.bytes for c in found))} together"


def _kinds(found: list[Collective]) -> str:
    counts = Counter(c.kind for c in found)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def synchronisation(program: Program, drift: float | None, count: int) -> dict[str, str]:
    """Returns rows about synchronisation: bytes, collectives, waiting, and drift."""
    rows = traffic(program.config, program.traffic(), count)
    if count == 1:
        return rows
    if program.collectives:
        rows["collectives"] = f"{collectives(program)}, in the compiled program"
    if program.waiting is not None:
        rows["waiting"] = (
            f"{program.waiting:.1%} of the devices' time in collectives: for others, and for what "
            "is sent (from a short profile)"
        )
    if drift is not None:
        rows["drift"] = (
            f"{drift:.2e}: how far the replicas were from their mean before the last "
            "synchronisation, relative to its norm"
        )
    return rows


def diagnosis(found: dict[str, Any]) -> dict[str, str]:
    """Returns a table about the step at which a run diverged; see `divergence.diagnose`."""
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
