"""The best model for a time: its size, tokens, batch and learning rate, by published rules.

- Size: 20 tokens for each parameter (Chinchilla, Hoffmann et al. 2022), embeddings not counted. Not
  to count them is our choice: they are few in Chinchilla's models, but most of a tiny one.
- A batch of 0.58 D^0.571 tokens, and for AdamW a peak learning rate of 1.79 N^-0.713 D^0.307, with
  D tokens in all and N parameters without embeddings (Li et al. 2025, "Predictable Scale: Part I").
  They were fitted to models of 60M parameters and more; for tiny ones the rate would be far too
  high, so that it is 0.01 at most, our choice.
- Shape: about 64 times as wide as it has layers; heads 32 wide in models less wide than 256, from
  there 64, and 128 from 2,048 on. Our choice: the loss depends little on it (Kaplan et al. 2020).

The speed depends on the size. So the training step of the proposed size is compiled and timed, and
with its speed the size is chosen again.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common.choices import MAX_INT32
from jaxdp.common.errors import ConfigError
from jaxdp.common.terminal import quantity
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.flops import flops_per_token
from jaxdp.model.transformer import Transformer, num_parameters, parameter_shapes
from jaxdp.sync import methods
from jaxdp.sync.methods import METHODS

TOKENS_PER_PARAMETER = 20
REPEATS = 4  # More passes over the same text are worth little (Muennighoff et al. 2023).
USED = 0.97  # The share of the time for steps and evaluations; the rest is for checkpoints.
EVALUATIONS = 4
WIDTHS = [*range(64, 1024, 64), *range(1024, 4096, 128), *range(4096, 16_385, 256)]
LEAST_STEPS = 20
HIGHEST_RATE = 0.01
SAID = ("model.num_layers", "model.embed_dim", "model.num_heads", "num_train_steps")  # Always.
TRIALS = 4  # Sizes that are timed, at most.


class Size(NamedTuple):
    """The size of a model."""

    layers: int
    width: int


class Cost(NamedTuple):
    """What a model costs.

    Attributes:
      parameters: all of them.
      core: those that are no token embeddings, nor the head.
      per_token: FLOPs per token, with those that remat adds.
    """

    parameters: int
    core: int
    per_token: float


class Budget(NamedTuple):
    """What there is to train with.

    Attributes:
      hours: of training and evaluation.
      vocab: size of the tokenizer's vocabulary.
      devices: those that train.
      train: tokens of training text; 0: not known.
      validation: tokens of each split to evaluate on; empty: not known.
      ratio: tokens for each parameter of the core; see `Cost`.
    """

    hours: float
    vocab: int
    devices: Sequence[jax.Device]
    train: int = 0
    validation: Sequence[int] = ()
    ratio: float = TOKENS_PER_PARAMETER


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What to train in a time.

    Attributes:
      config: the config with the proposed keys.
      keys: these keys and their values.
      parameters: of the model, all of them.
      core: those that are no embeddings; see `Cost`.
      tokens: tokens to train on.
      rate: FLOP/s that a device reaches.
      seconds: seconds per optimizer step.
      passes: times that the training text is read; 0: not known.
    """

    config: ConfigDict
    keys: dict[str, Any]
    parameters: int
    core: int
    tokens: int
    rate: float
    seconds: float
    passes: float

    @property
    def flags(self) -> str:
        """The keys as flags of a command."""
        return " ".join(f"--config.{key}={value}" for key, value in self.keys.items())

    def rows(self) -> dict[str, str]:
        """Returns the proposal as rows of a table."""
        c = self.config
        ratio = f"{self.tokens / self.core:.1f} for each parameter, embeddings not counted"
        tokens = f"{quantity(self.tokens)}, {ratio}"
        if self.passes:
            tokens += f", {self.passes:.2g} passes over the text"
        if self.passes > REPEATS:
            tokens += f"; more than {REPEATS} are worth little, more text would be better"
        kept = "" if c.optimizer.name == "adamw" else ", as it was: the rule is for adamw"
        return {
            "model": f"{c.model.num_layers} layers x {c.model.embed_dim}, "
            f"{quantity(self.parameters)} parameters",
            "tokens": tokens,
            "steps": f"{c.num_train_steps:,} of {c.global_batch_size * c.seq_len:,} tokens, "
            f"{1000 * self.seconds:.4g} ms each",
            "learning rate": f"{c.optimizer.learning_rate:g}{kept}",
            "to paste": self.flags,
        }


def propose(
    config: ConfigDict,
    budget: Budget,
    rate: float,
    measure: Callable[[ConfigDict], tuple[ConfigDict, float]] | None = None,
) -> Proposal:
    """Proposes what to train in a time.

    Args:
      config: a valid config, which decides all that isn't proposed.
      budget: the time, the devices, and the text.
      rate: FLOP/s that a device reaches; with `measure`, a first guess of it.
      measure: takes a proposed config; returns it, with as many micro-batches as it takes to fit in
        memory, and the rate that it reaches.

    Raises:
      ConfigError: there are no rules for such a config, or the time is too short.
    """
    check(config, budget.hours)
    given, size, seen = config, best_size(config, budget, rate), set[Size]()
    while measure and len(seen) < TRIALS:
        seen.add(size)
        fitting, rate = measure(filled(config, given, size, budget, rate).config)
        config = configs.with_value(config, "grad_accum_steps", fitting.grad_accum_steps)
        better = best_size(config, budget, rate)
        if better in seen:
            break
        size = better
    return filled(config, given, size, budget, rate)


def check(config: ConfigDict, hours: float) -> None:
    """Raises ConfigError if there are no rules for a config, or for so many hours."""
    if not 0 < hours < math.inf:
        raise ConfigError(f"--hours={hours:g} is no time to train in: give hours, such as 0.5")
    if config.objective != "causal":
        raise ConfigError(
            f"--hours has no rule for objective={config.objective!r}: leave it out, or use 'causal'"
        )
    if config.init_from:
        raise ConfigError(
            "--hours chooses the size of a model, and the weights of "
            f"init_from={config.init_from!r} have one: leave one of the two out"
        )


def best_size(config: ConfigDict, budget: Budget, rate: float) -> Size:
    """Returns the size at which the tokens that there is time for come nearest to the rule."""
    flops = USED * 3600 * budget.hours * len(budget.devices) * rate

    @functools.cache
    def cost_of(width: int, layers: int) -> Cost:
        return cost(config, Size(layers, width), budget.vocab)

    def excess(size: Size) -> float:
        """Log of how many times as many tokens there is time for as the rule asks for."""
        one, two = (cost_of(size.width, n) for n in (1, 2))  # Each layer adds the same.
        core = one.core + (size.layers - 1) * (two.core - one.core)
        per_token = one.per_token + (size.layers - 1) * (two.per_token - one.per_token)
        return math.log(flops / per_token / core / budget.ratio)

    def distance(size: Size) -> float:
        return abs(excess(size)) + 0.1 * abs(math.log(size.width / size.layers / 64))

    # Of models of the usual shape the widest that is small enough, and the next.
    usual = bisect.bisect(WIDTHS, 0.0, key=lambda w: -excess(Size(max(1, w // 64), w)))
    widths = WIDTHS[max(0, usual - 1) : usual + 1]
    sizes = [Size(n, w) for w in widths for n in range(max(1, w // 96), w // 32 + 1)]
    return min(sizes, key=distance)


def cost(config: ConfigDict, size: Size, vocab: int) -> Cost:
    """Returns what a model of a size costs."""
    model = ModelConfig.from_config(with_size(config, size), vocab)
    parameters = num_parameters(parameter_shapes(Transformer(model)))
    core = parameters - model.vocab_size * size.width * (1 if model.tied_head else 2)
    return Cost(
        parameters, core, flops_per_token(model, parameters) * (4 / 3 if model.remat else 1)
    )


def with_size(config: ConfigDict, size: Size) -> ConfigDict:
    """Returns a config with a model of another size, and its heads and MLP in proportion."""
    c, width = config.model, size.width
    heads = max(1, width // (c.head_dim or (32 if width < 256 else 64 if width < 2048 else 128)))
    groups = max(1, heads * c.num_kv_heads // c.num_heads)  # At most so many; they divide heads.
    groups = max(n for n in range(1, groups + 1) if heads % n == 0)
    mlp = c.mlp_dim / c.embed_dim * width
    other = config.copy_and_resolve_references()
    other.model.update(
        {
            "num_layers": size.layers,
            "embed_dim": width,
            "num_heads": heads,
            "num_kv_heads": groups if c.num_kv_heads else 0,
            "mlp_dim": round(mlp / 64) * 64 or max(round(mlp), min(c.mlp_dim, 1)),  # 0 is 4 x.
        }
    )
    return other


def filled(
    config: ConfigDict, given: ConfigDict, size: Size, budget: Budget, rate: float
) -> Proposal:
    """Returns the proposal of a size, where devices reach `rate` FLOP/s with it.

    Args:
      config: what decides all that isn't proposed.
      given: the config that the proposed keys are to change.
      size: the model's.
      budget: what there is to train with.
      rate: FLOP/s of a device.
    """
    parameters, core, per_token = cost(config, size, budget.vocab)
    speed = rate * len(budget.devices) / per_token
    unit = METHODS[config.sync.method].batch_unit(config, len(budget.devices)) * len(budget.devices)
    tokens = total = USED * 3600 * budget.hours * speed
    for _ in range(2):  # The batch depends on what evaluations leave, and they on the batch.
        rows = round(batch_tokens(max(tokens, 1)) / config.seq_len / unit) * unit or unit
        most = config.eval_max_batches * rows * config.seq_len or math.inf
        # An evaluation takes a third of a training step's time, for the forward pass.
        tokens = total - EVALUATIONS * sum(min(size, most) for size in budget.validation) / 3
    every = methods.make(config, "", 1).every  # Evaluations come after whole rounds.
    steps = min(int(tokens / rows / config.seq_len), MAX_INT32) // every * every
    if steps < LEAST_STEPS:
        raise ConfigError(
            f"--hours={budget.hours:g} is time for {max(steps, 0)} steps of {rows} sequences, even "
            f"with a model of {size.layers} layers x {size.width}: give more"
        )
    due = -(-steps // EVALUATIONS // every) * every
    tokens = steps * rows * config.seq_len
    new = with_size(config, size)
    new.update({"global_batch_size": rows, "num_train_steps": steps, "num_epochs": 0})
    new.eval_every = new.checkpoint.every = due
    if config.optimizer.name == "adamw":
        new.optimizer.learning_rate = float(f"{learning_rate(core, tokens):.2g}")
    old, flat = configs.flatten(given), configs.flatten(new)
    return Proposal(
        config=new,
        keys={key: value for key, value in flat.items() if key in SAID or value != old[key]},
        parameters=parameters,
        core=core,
        tokens=tokens,
        rate=rate,
        seconds=rows * config.seq_len / speed,
        passes=tokens / budget.train if budget.train else 0.0,
    )


def batch_tokens(tokens: float) -> float:
    """Returns the best number of tokens in a batch, of this many in all (Li et al. 2025)."""
    return 0.58 * tokens**0.571


def learning_rate(parameters: int, tokens: float) -> float:
    """Returns AdamW's best peak learning rate (Li et al. 2025), at most 0.01.

    Args:
      parameters: of the model without embeddings.
      tokens: tokens to train on.
    """
    return min(1.79 * parameters**-0.713 * tokens**0.307, HIGHEST_RATE)
