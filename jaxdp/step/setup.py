"""What a run is made of, built once from its config: batch sizes, model, objective, optimizer.

Keys of the config are checked against each other here, before anything is compiled. `common.config`
checks each key by itself.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping

import optax
from ml_collections import ConfigDict

from jaxdp.common.choices import MAX_INT32
from jaxdp.common.config import check_model, check_values
from jaxdp.common.errors import ConfigError, shown
from jaxdp.data import special_tokens
from jaxdp.data.feed import Feed
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.transformer import Transformer
from jaxdp.parallel.replicas import AXIS
from jaxdp.step.objective import Objective, get_objective
from jaxdp.step.optimizer import get_optimizer, get_schedule
from jaxdp.sync import methods
from jaxdp.sync.islands import Islands
from jaxdp.sync.method import Sync
from jaxdp.sync.methods import METHODS


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Sequences per optimizer step, from all processes down to one forward pass."""

    global_: int
    per_host: int
    per_device: int
    micro: int


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a config, a tokenizer and a number of devices determine; constant during a run.

    Attributes:
      config: a valid config, with its number of steps resolved.
      device_count: N, over all processes.
      vocab_size: size of the tokenizer's vocabulary; the model's may be padded to more.
      sizes: how the global batch is split.
      model: the Flax module.
      objective: the training loss.
      method: the sync method.
      schedule: step -> learning rate.
      optimizer: the optax chain.
      feeds: data by name: "" is the run's own, the others are extra evaluation sets; empty in a
        plan.
    """

    config: ConfigDict
    device_count: int
    vocab_size: int
    sizes: BatchSizes
    model: Transformer
    objective: Objective
    method: Sync
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    feeds: Mapping[str, Feed] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        """Returns one line, without the trees of configs and functions."""
        return (
            f"Setup({self.device_count} devices, {self.sizes.global_} sequences a step, "
            f"sync.method={self.config.sync.method!r})"
        )

    @property
    def islands(self) -> Islands:
        """The groups of devices that are synchronised in every step."""
        return self.method.islands(self.device_count)

    @property
    def feed(self) -> Feed:
        """The run's own data."""
        return self.feeds[""]


def make_setup(
    config: ConfigDict,
    vocab_size: int,
    device_count: int,
    *,
    process_count: int = 1,
    mask_id: int | None = None,
    feeds: Mapping[str, Feed] | None = None,
) -> Setup:
    """Builds the setup that a config asks for.

    Args:
      config: a valid config.
      vocab_size: size of the tokenizer's vocabulary.
      device_count: N, over all processes.
      process_count: number of processes.
      mask_id: id of the mask token; only objective="masked" needs one.
      feeds: see `Setup`.

    Raises:
      ConfigError: the batch can't be split over the devices.
    """
    schedule = get_schedule(config)
    return Setup(
        config=config,
        device_count=device_count,
        vocab_size=vocab_size,
        sizes=batch_sizes(config, process_count, device_count),
        model=Transformer(ModelConfig.from_config(config, vocab_size)),
        objective=get_objective(config, vocab_size, mask_id),
        method=methods.make(config, AXIS, process_count),
        schedule=schedule,
        optimizer=get_optimizer(config, schedule),
        feeds=feeds or {},
    )


def setup_of_feeds(feeds: Mapping[str, Feed], device_count: int, process_count: int) -> Setup:
    """Builds the setup of a run from its data; feeds[""] holds its config and tokenizer."""
    cache = feeds[""].cache
    return make_setup(
        feeds[""].config,
        cache.vocab_size,
        device_count,
        process_count=process_count,
        mask_id=special_tokens.mask_id(cache.tokenizer),
        feeds=feeds,
    )


def batch_sizes(config: ConfigDict, process_count: int, device_count: int) -> BatchSizes:
    """Splits the global batch equally over processes, devices and micro-batches.

    Examples:
      >>> from jaxdp.configs import default
      >>> batch_sizes(default.get_config(), process_count=2, device_count=8)
      BatchSizes(global_=16, per_host=8, per_device=2, micro=2)

    Args:
      config: a valid config.
      process_count: number of processes.
      device_count: number of devices over all processes.

    Raises:
      ConfigError: it can't be split equally.
    """
    total, accum = config.global_batch_size, config.grad_accum_steps
    parts = device_count * accum
    if total % parts:
        below, above = total // parts * parts, -(-total // parts) * parts
        fix = f"{above}" if below == 0 else f"{below} or {above}"
        raise ConfigError(
            f"global_batch_size={total} can't be split equally over {device_count} devices x "
            f"grad_accum_steps={accum}: use {fix}, or another number of devices"
        )
    METHODS[config.sync.method].check_devices(config, device_count)
    per_device = total // device_count
    micro = per_device // METHODS[config.sync.method].batch_unit(config, device_count)
    return BatchSizes(total, total // process_count, per_device, micro)


def can_split(config: ConfigDict, device_count: int) -> bool:
    """Returns whether the global batch can be split over this number of devices."""
    try:
        batch_sizes(config, 1, device_count)
    except ConfigError:
        return False
    return True


def same_on_two_devices(config: ConfigDict) -> bool:
    """Returns whether two devices can train the run, and as one would, up to rounding."""
    return METHODS[config.sync.method].same_on_any_devices and can_split(config, 2)


def validate(config: ConfigDict) -> None:
    """Checks everything in a config that needs neither data nor devices.

    Raises:
      ConfigError: for an unknown or missing key, a wrong type, or an impossible value.
    """
    check_values(config)
    if not config.data.path:
        raise ConfigError(
            "data.path='' names no data: give --config.data.path=FILE.txt, a folder, a quoted glob "
            "or tfds:NAME"
        )
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"wandb_project={shown(config.wandb_project)} needs the package wandb: pip install "
            "'jaxdp[wandb]', or leave it empty"
        )
    if config.data.prompt_key and config.data.packing != "padded":
        raise ConfigError(
            f"data.prompt_key={shown(config.data.prompt_key)} has no meaning with data.packing="
            f"{config.data.packing!r}: use 'padded', or leave it empty"
        )
    _check_chats(config)
    if config.init_from and not config.init_from.startswith("hf:"):
        raise ConfigError(
            f"init_from={shown(config.init_from)} is unknown: write hf:FOLDER or hf:NAME"
        )
    check_model(config)
    methods.check(config)
    if config.num_epochs == 0:
        _check_profile(config)


def _check_chats(config: ConfigDict) -> None:
    c = config.data
    if c.chat_template and not c.messages_key:
        raise ConfigError(
            f"data.chat_template={shown(c.chat_template)} has no meaning without data.messages_key:"
            " set that, or leave it empty"
        )
    if c.messages_key and c.prompt_key:
        raise ConfigError(
            f"data.messages_key={shown(c.messages_key)} does not go with data.prompt_key: leave "
            "one of them empty"
        )
    if c.messages_key and config.objective != "causal":
        raise ConfigError(
            f"data.messages_key={shown(c.messages_key)} needs objective='causal': leave it empty, "
            "or change the objective"
        )


def resolve_steps(config: ConfigDict, feed: Feed, say: Callable[[str], None]) -> None:
    """Sets a config's number of steps, and shortens a warm-up that lasts as long as the run.

    Args:
      config: a valid config, changed in place.
      feed: the run's data, which num_epochs counts passes over.
      say: called with a line of text if the warm-up is shortened.

    Raises:
      ConfigError: num_epochs doesn't fit the data, or the run is too short for its profile.
    """
    if config.num_epochs:
        if len(feed.shares) > 1:
            raise ConfigError(
                f"num_epochs={config.num_epochs} has no meaning with several sources in "
                "data.path: set num_train_steps"
            )
        steps = feed.epoch_steps()
        if steps > MAX_INT32:
            raise ConfigError(
                f"num_epochs={config.num_epochs} is {steps} steps, too many: give a smaller "
                "number, or raise global_batch_size"
            )
        config.num_train_steps = steps
    _check_profile(config)
    total, warmup = config.num_train_steps, config.optimizer.warmup_steps
    if warmup >= total:
        config.optimizer.warmup_steps = total // 10
        say(
            f"The warm-up of {warmup:,} steps is shortened to {total // 10:,}, a tenth of the "
            f"run's {total:,} steps."
        )


def _check_profile(config: ConfigDict) -> None:
    profile = config.profile
    if profile.num_steps and profile.start_step + profile.num_steps > config.num_train_steps:
        raise ConfigError(
            f"profile.start_step={profile.start_step} and profile.num_steps={profile.num_steps} "
            f"reach beyond num_train_steps={config.num_train_steps}: make them smaller"
        )
