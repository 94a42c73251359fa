"""A run, from a config to a trained model."""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxdp import config as configs
from jaxdp import losses, parallel, report, sampling, tokenizer
from jaxdp.checkpoint import Checkpoints
from jaxdp.config import BatchSizes, ConfigError
from jaxdp.data import pipeline
from jaxdp.data.cache import TokenCache, open_cache
from jaxdp.display import Display
from jaxdp.evaluate import Evaluation, evaluate
from jaxdp.metrics import MetricsWriter, Throughput
from jaxdp.model import ModelConfig, Transformer, flops_per_token, num_parameters
from jaxdp.optimizer import get_optimizer, get_schedule
from jaxdp.parallel import Replicas
from jaxdp.step import Transform, create_state, eval_step, plain, train_step


@dataclasses.dataclass(frozen=True)
class Result:
    """What has become of a run.

    Attributes:
      step: optimizer steps done in all.
      finished: whether these are all; if not, the run was asked to stop, and has saved.
      evaluation: of the last step, where this call evaluated it.
      state: the last one, replicated over the devices.
    """

    step: int
    finished: bool
    evaluation: Evaluation | None
    state: Any


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains, or goes on where the workdir's newest checkpoint ends.

    Args:
      config: with the keys of configs/default.py.
      workdir: takes config.json, metrics.jsonl, tensorboard/, checkpoints/ and tokenizer.json.
      devices: to train on; all by default.
      stop_requested: asked before each batch; if true in any process, all of them save and return.

    Raises:
      ConfigError: the config, the data or the workdir are not fit for use; nothing was changed.
    """
    configs.validate(config)
    workdir, replicas, display = Path(workdir), Replicas(devices), Display(not parallel.is_main())
    sizes = configs.batch_sizes(config, jax.process_count(), replicas.device_count)
    if (workdir / "config.json").exists():
        configs.check_same_run(config, configs.load(workdir / "config.json"))
    cache = open_cache(config, display.line)
    _check_data(config, cache)
    _create(workdir)

    model = Transformer(ModelConfig.from_config(config, cache.vocab_size))
    schedule = get_schedule(config)
    state = replicas.replicate(create_state(model, get_optimizer(config, schedule), config.seed))
    with Checkpoints(workdir, config) as checkpoints:
        start, latest = 0, checkpoints.latest()
        if latest is not None:
            start, extra = latest
            _check_same_tokens(config, cache, extra["digest"])
            state = checkpoints.restore(start, state, replicas)
        display.table("jaxdp", report.header(config, workdir, replicas, sizes, cache, state.params))
        if start >= config.num_train_steps:
            display.line(report.already_finished(start))
            return Result(start, True, None, state)
        if latest is not None:
            display.line(f"Going on after step {start:,}.")
        if parallel.is_main():
            configs.save(config, workdir / "config.json")
            configs.write_whole(workdir / "tokenizer.json", cache.tokenizer.to_str(pretty=True))
        with MetricsWriter(workdir, config, start, active=parallel.is_main()) as writer, display:
            run = _Run(config, workdir, replicas, sizes, cache, model, display, checkpoints, writer)
            result = run.train(state, start, schedule, stop_requested)
            checkpoints.wait()
            run.summarise(result)
            return result


@dataclasses.dataclass
class _Run:
    """A run under way: what its steps, evaluations and checkpoints share."""

    config: ConfigDict
    workdir: Path
    replicas: Replicas
    sizes: BatchSizes
    cache: TokenCache
    model: Transformer
    display: Display
    checkpoints: Checkpoints
    writer: MetricsWriter

    def __post_init__(self) -> None:
        self.transform = _transform(self.config, self.cache)
        step = functools.partial(eval_step, seed=self.config.seed, transform=self.transform)
        self.p_eval_step = self.replicas.pmap(step)

    def train(
        self, state: Any, start: int, schedule: optax.Schedule, stop_requested: Callable[[], bool]
    ) -> Result:
        """Steps from `start` to the end, or until asked to stop."""
        config, total = self.config, self.config.num_train_steps
        p_train_step = self._p_train_step(schedule)
        batches = self.replicas.prefetch(self._batches(start, stop_requested))
        flops = flops_per_token(self.model.config, num_parameters(state.params))
        self.throughput = Throughput(flops, self.replicas.device_count)
        self.display.line("Compiling the training step ...")
        pending, evaluation, stop = None, None, False

        for done in range(start + 1, total + 1):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            state, metrics = p_train_step(state, batch)
            # A step's figures are read after the next step is dispatched, so that the devices
            # never wait for Python. More than two steps in flight can deadlock CPU devices.
            if pending is not None:
                stop = self._log(*pending)
            elif done == start + 1:
                jax.block_until_ready(metrics)
                self.display.start(start, total)
                self.throughput.start(steps=-1)  # The first step's time is that of compilation.
            pending = (done, metrics, waited)

            evaluating = done % config.eval_every == 0 or done == total
            saving = done % config.checkpoint.every == 0 or done == total
            if stop or evaluating or saving:
                stop = self._log(*pending) or stop
                pending = None
                evaluation = self._evaluate(done, state) if evaluating else None
                if stop or saving:
                    self.writer.flush()
                    loss = evaluation.loss if evaluation else None
                    self.checkpoints.save(done, state, {"digest": self.cache.digest}, loss)
            if stop:
                break
        return Result(done, done == total, evaluation, state)

    def _p_train_step(self, schedule: optax.Schedule) -> Callable:
        step = functools.partial(
            train_step,
            schedule=schedule,
            grad_accum_steps=self.config.grad_accum_steps,
            seed=self.config.seed,
            transform=self.transform,
        )
        return self.replicas.pmap(step, donate=True)

    def _batches(self, start: int, stop_requested: Callable[[], bool]) -> Iterator[pipeline.Batch]:
        """This process's batches, and with each whether the process was asked to stop."""
        batches = pipeline.train_batches(
            self.cache.train,
            objective=self.config.objective,
            seq_len=self.config.seq_len,
            seed=self.config.seed,
            start_step=start,
            num_steps=self.config.num_train_steps,
            global_batch_size=self.sizes.global_,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for batch in batches:
            yield batch | {"stop": np.full(self.sizes.per_host, stop_requested(), np.float32)}

    def _log(self, done: int, metrics: dict[str, jax.Array], waited: float) -> bool:
        """Logs a step where that is due; returns whether any process was asked to stop."""
        figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.display.step(done)
        self.throughput.add(int(figures["tokens"]), waited)
        if done % self.config.log_every == 0 or done == self.config.num_train_steps:
            speed = self.throughput.read()
            self.display.figures(done, figures["loss"], speed["tokens_per_second"])
            names = ("loss", "grad_norm", "learning_rate")
            self.writer.write(done, {**{f"train/{name}": figures[name] for name in names}, **speed})
        return figures["stop"] > 0

    def _evaluate(self, done: int, state: Any) -> Evaluation:
        """Evaluates on the validation split, and logs the result."""
        before = time.perf_counter()
        batches = pipeline.eval_batches(
            self.cache.validation,
            objective=self.config.objective,
            seq_len=self.config.seq_len,
            max_batches=self.config.eval_max_batches,
            global_batch_size=self.sizes.global_,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        evaluation = evaluate(self.p_eval_step, state, batches, self.replicas)
        bits_per_byte = evaluation.bits_per_byte(self.cache.tokens_per_byte)
        values = {
            "eval/loss": evaluation.loss,
            "eval/perplexity": evaluation.perplexity,
            "eval/bits_per_byte": bits_per_byte,
        }
        self.writer.write(done, values)
        words = report.in_words(evaluation, bits_per_byte)
        self.display.line(f"evaluation at step {done}: {words}", "bold")
        self.throughput.pause(time.perf_counter() - before)
        return evaluation

    def summarise(self, result: Result) -> None:
        """Shows a sample of text, what was reached, and where everything lies."""
        self.display.stop()
        sampling_wanted = self.config.objective == "causal" and self.config.sample.num_tokens
        if result.finished and sampling_wanted and parallel.is_main():
            text = self._sample(result.state.params)
            self.display.text("Sample", text)
            self.writer.write_text(result.step, "sample", text)
        self.display.table(
            "Finished" if result.finished else "Stopped as asked; run again to go on",
            report.summary(self.config, self.workdir, self.cache, result, self.display.seconds()),
        )

    def _sample(self, params: Any) -> str:
        [prompt] = tokenizer.encode(self.cache.tokenizer, [self.config.sample.prompt])
        [ids] = sampling.sample(
            self.model,
            jax.device_get(params),
            [prompt],
            vocab_size=self.cache.vocab_size,
            num_tokens=self.config.sample.num_tokens,
            temperature=sampling.TEMPERATURE,
            seed=self.config.seed,
        )
        return self.cache.tokenizer.decode([*prompt, *ids], skip_special_tokens=False)


def _transform(config: ConfigDict, cache: TokenCache) -> Transform:
    if config.objective == "causal":
        return plain
    mask_id = tokenizer.mask_id(cache.tokenizer)
    assert mask_id is not None
    return functools.partial(losses.mask_tokens, mask_id=mask_id, vocab_size=cache.vocab_size)


def _check_data(config: ConfigDict, cache: TokenCache) -> None:
    """Refuses splits that hold not even one sequence, and a sample prompt that can't be read."""
    for split, tokens in (("training", cache.train), ("validation", cache.validation)):
        if len(tokens) <= config.seq_len:
            raise ConfigError(
                f"data.path={config.data.path!r} gives {len(tokens)} {split} tokens, too few for "
                f"one sequence of seq_len={config.seq_len} and a next token: give more text, or a "
                "smaller seq_len"
            )
    if config.objective == "causal" and config.sample.num_tokens:
        [prompt] = tokenizer.encode(cache.tokenizer, [config.sample.prompt])
        if len(prompt) == 0:
            raise ConfigError(
                f"sample.prompt={config.sample.prompt!r} is empty: give at least one character, or "
                "sample.num_tokens=0"
            )


def _check_same_tokens(config: ConfigDict, cache: TokenCache, digest: str) -> None:
    if cache.digest != digest:
        raise ConfigError(
            f"data.path={config.data.path!r} no longer gives the tokens that this workdir was "
            "trained on: restore the data, or use another --workdir"
        )


def _create(workdir: Path) -> None:
    """Makes the workdir where there is none yet, and makes sure that it can be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} can't be written ({error.strerror}): choose another folder"
        ) from None
