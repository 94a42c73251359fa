"""A run, from a config to a trained model."""

import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdp import config as configs
from jaxdp import divergence, losses, parallel, preflight, report, sampling, tokenizer
from jaxdp.agreement import ReplicaCheck
from jaxdp.checkpoint import Checkpoints
from jaxdp.config import BatchSizes, ConfigError, RunError
from jaxdp.data import pipeline
from jaxdp.data.cache import TokenCache, open_cache
from jaxdp.data.feed import Feed
from jaxdp.display import Display
from jaxdp.divergence import Divergence
from jaxdp.evaluate import Evaluation, evaluate
from jaxdp.limits import MOST
from jaxdp.metrics import MetricsWriter, Throughput, load_balance
from jaxdp.model import ModelConfig, Transformer, flops_per_token, num_parameters
from jaxdp.optimizer import get_optimizer, get_schedule
from jaxdp.parallel import Replicas
from jaxdp.program import Program
from jaxdp.step import Transform, create_state, eval_step, plain, saved_shapes
from jaxdp.watchdog import Watchdog


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
    preflight.check_workdir(workdir)
    if (workdir / "config.json").exists():
        configs.check_same_run(config, configs.load(workdir / "config.json"))
    cache = open_cache(config, display.line)
    preflight.check_data(config, cache)
    config = _with_steps(config, len(cache.train))
    preflight.check_memory(config, ModelConfig.from_config(config, cache.vocab_size), sizes)
    preflight.create_workdir(workdir)
    watchdog = Watchdog(config.hang_seconds)
    with preflight.locked(workdir), parallel.others_needed(), watchdog:
        return _train(config, workdir, replicas, sizes, cache, display, watchdog, stop_requested)


def _train(
    config: ConfigDict,
    workdir: Path,
    replicas: Replicas,
    sizes: BatchSizes,
    cache: TokenCache,
    display: Display,
    watchdog: Watchdog,
    stop_requested: Callable[[], bool],
) -> Result:
    model = Transformer(ModelConfig.from_config(config, cache.vocab_size))
    schedule = get_schedule(config)
    program = Program(config, replicas, schedule, _transform(config, cache))
    optimizer = get_optimizer(config, schedule)
    shapes = saved_shapes(model, optimizer, program.method, replicas.device_count)
    preflight.check_disk(workdir, shapes)
    first_state = functools.partial(
        create_state, model, optimizer, config.seed, replicas, program.method
    )
    state, judge = first_state(), Divergence(config)
    with Checkpoints(workdir, config, replicas, program.method, display.line) as checkpoints:
        same = functools.partial(preflight.same_tokens, config, cache)
        start, found = 0, checkpoints.restore(state, same)
        if found is not None:
            start, extra, state = found
            judge.load(extra["divergence"])
        traffic = report.traffic(config, program.traffic(state), replicas.device_count)
        header = report.header(config, workdir, replicas, sizes, cache, state.params)
        display.table("jaxdp", header | traffic)
        if start >= config.num_train_steps:
            display.line(report.already_finished(start))
            return Result(start, True, None, state)
        if found is not None:
            display.line(f"Going on after step {start:,}.")
        parallel.on_main(functools.partial(_describe, config, workdir, cache))
        with MetricsWriter(workdir, config, start, active=parallel.is_main()) as writer, display:
            run = _Run(
                config,
                workdir,
                replicas,
                sizes,
                cache,
                model,
                first_state,
                program,
                judge,
                display,
                checkpoints,
                writer,
                watchdog,
            )
            with contextlib.closing(program):
                result = run.train(state, start, stop_requested)
            watchdog.beat("writing the last checkpoint", result.step, slow=True)
            run.finish(result)
            watchdog.beat("summarising", result.step, slow=True)
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
    first_state: Callable[[], Any]
    program: Program
    judge: Divergence
    display: Display
    checkpoints: Checkpoints
    writer: MetricsWriter
    watchdog: Watchdog

    def __post_init__(self) -> None:
        step = functools.partial(
            eval_step,
            apply_fn=self.model.apply,
            seed=self.config.seed,
            transform=_transform(self.config, self.cache),
        )
        self.p_eval_step = self.replicas.pmap(step)
        self.feed = Feed(self.config, self.cache)
        self.tokenizer_digest = tokenizer.digest(self.cache.tokenizer)
        self.replica_check = ReplicaCheck(self.replicas)
        self.busy = 0.0  # Seconds that this process was last busy with a step, not with waiting.

    def train(self, state: Any, start: int, stop_requested: Callable[[], bool]) -> Result:
        """Steps from `start` to the end, or until asked to stop."""
        total = self.config.num_train_steps
        rounds = self._rounds(start, stop_requested)
        flops = flops_per_token(self.model.config, num_parameters(state.params))
        self.throughput = Throughput(flops, self.replicas.device_count)
        self.display.line("Compiling the training step ...")
        done, pending, evaluation, stop = start, None, None, False

        while done < total and not stop:
            self.watchdog.beat("waiting for data", done)
            asked = time.perf_counter()
            batch = next(rounds)
            waited = time.perf_counter() - asked
            new = self.program.is_new(done)
            self.watchdog.beat("compiling a step" if new else "training", done, slow=new)
            steps = self.program.round_length(done)
            state, metrics = self.program(done, state, batch)
            # A round's figures are read after the next is dispatched, so that the devices never
            # wait for Python. More than two steps in flight can deadlock CPU devices.
            dispatched = time.perf_counter()
            if pending is not None:
                stop = self._log(*pending)
            if self.program.fresh:
                jax.block_until_ready(metrics)
                self.display.line(f"Compiled: {report.collectives(self.program)}.")
                # The time of this round is that of compilation.
                self.throughput.start(steps=-steps)
            if done == start:
                self.display.start(start, total)
            if self.program.trace(metrics):
                self.throughput.start(steps=-steps)
            self.busy = dispatched - asked
            self.checkpoints.check()
            first, done, pending = done, done + steps, (done, metrics, waited)

            evaluating, saving = self._due(done)
            if self.judge.trouble is None and (stop or evaluating or saving):
                stop = self._log(*pending) or stop
                pending = None
            if self.judge.trouble:
                # What was dispatched since is forgotten: where it ended must not depend on that.
                before = time.perf_counter()
                done, state = self._roll_back(state)
                self.throughput.pause(time.perf_counter() - before)
                rounds, pending = self._rounds(done, stop_requested), None
                evaluating, saving = self._due(done)
            if self._check_due(first, done) or stop or saving:
                self._check_replicas(done, state)
            evaluation = self._evaluate(done, state) if evaluating else None
            # Parameters in doubt don't take the place of good ones.
            saving = saving and (self.judge.in_a_row == 0 or done == total)
            if stop or saving:
                self.watchdog.beat("saving", done, slow=True)
                self.writer.flush()
                loss = evaluation.loss if evaluation else None
                extra = {
                    "digest": self.cache.digest,
                    "tokenizer": self.tokenizer_digest,
                    "divergence": self.judge.to_json(),
                }
                self.checkpoints.save(done, state, extra, loss)
        return Result(done, done == total, evaluation, state)

    def _due(self, done: int) -> tuple[bool, bool]:
        """Whether to evaluate and whether to save after so many steps."""
        last = done == self.config.num_train_steps
        evaluating = done % self.config.eval_every == 0 or last
        return evaluating, done % self.config.checkpoint.every == 0 or last

    def _rounds(self, start: int, stop_requested: Callable[[], bool]) -> Iterator[Any]:
        """The batches of rounds from `start` on, on the devices."""
        return parallel.prefetch(
            self._host_rounds(start, stop_requested), self.replicas.shard_steps
        )

    def _host_rounds(
        self, start: int, stop_requested: Callable[[], bool]
    ) -> Iterator[list[pipeline.Batch]]:
        """This process's batches, round by round.

        With each go whether the process was asked to stop, and how long it was busy with a step.
        """
        batches = self.feed.train(start)
        done = start
        while done < self.config.num_train_steps:
            steps = self.program.round_length(done)
            said = {
                "stop": np.full(self.sizes.per_host, stop_requested(), np.float32),
                "busy": np.full(self.sizes.per_host, self.busy, np.float32),
            }
            yield [batch | said for batch in itertools.islice(batches, steps)]
            done += steps

    def _check_due(self, before: int, done: int) -> bool:
        every = self.config.sync.check_every
        return every > 0 and before // every < done // every

    def _check_replicas(self, done: int, state: Any) -> None:
        """Stops the run where a device holds another state than the others."""
        if self.config.sync.check_every and self.replicas.device_count > 1:
            shared = {"params": state.params, "outer": state.outer}
            if not self.program.method.own_opt_state:
                shared["opt_state"] = state.opt_state
            self.watchdog.beat("comparing replicas", done)
            self.replica_check(shared, done)

    def _log(self, before: int, metrics: dict[str, jax.Array], waited: float) -> bool:
        """Logs a round's steps where due; returns whether any process was asked to stop."""
        metrics = jax.device_get(metrics)
        self._judge(before + len(metrics["loss"]), metrics)
        for i, tokens in enumerate(metrics["tokens"]):
            done = before + i + 1
            self.throughput.add(round(float(tokens.sum())), waited if i == 0 else 0.0)
            if done % self.config.log_every and done != self.config.num_train_steps:
                continue
            speed = self.throughput.read()
            loss = float(metrics["loss"][i])
            self.display.figures(done, loss, speed["tokens_per_second"])
            names = ("loss", "grad_norm", "learning_rate", "drift")
            values = {f"train/{n}": float(metrics[n][i]) for n in names if n in metrics}
            values["train/skipped"] = self.judge.skipped
            positions = self.sizes.per_device * self.config.seq_len
            self.writer.write(done, values | load_balance(metrics, i, positions) | speed)
        if "drift" in metrics:
            self.program.drift = float(metrics["drift"][-1])
        self.display.step(before + len(metrics["tokens"]))
        return bool(metrics["stop"].max() > 0)

    def _judge(self, done: int, metrics: dict[str, Any]) -> None:
        """Counts skipped updates, and sees whether the run diverges."""
        before = self.judge.skipped
        self.judge.add(done, metrics["loss"], metrics["skipped"])
        if self.judge.skipped > before:
            self.display.line(
                f"step {done}: loss or gradient is not finite, the update is skipped "
                f"({self.judge.skipped:,} so far)",
                "yellow",
            )

    def _roll_back(self, state: Any) -> tuple[int, Any]:
        """Takes back what came after the last good checkpoint, and skips its data.

        It is a scheduled checkpoint, as others depend on when a run happened to be interrupted.

        Returns:
          The step to go on from, and the state, at that step.

        Raises:
          RunError: it has been done often enough; says what is known of the cause.
        """
        trouble, c = self.judge.trouble, self.config.divergence
        assert trouble is not None
        if self.judge.rollbacks == c.max_rollbacks:
            raise self._diagnosis(trouble, state)
        self.watchdog.beat("going back", trouble.step, slow=True)
        found = self.checkpoints.restore(state, self._good)
        step, state = (found[0], found[2]) if found else (0, self.first_state())
        self.judge.roll_back()
        self.display.line(
            f"step {trouble.step}: {trouble.reason}. Back to the parameters of step {step}; the "
            f"data of the steps since is skipped (roll-back {self.judge.rollbacks} of at most "
            f"{c.max_rollbacks}).",
            "bold yellow",
        )
        return trouble.step, self.program.at_step(state, trouble.step)

    def _good(self, step: int, extra: dict[str, Any]) -> bool:
        scheduled = step % self.config.checkpoint.every == 0
        return scheduled and extra["divergence"]["in_a_row"] == 0

    def _diagnosis(self, trouble: divergence.Trouble, state: Any) -> RunError:
        """Shows and writes what is known of a step that the run can't get past."""
        step = trouble.step - 1  # Counted from 0, as the state and the data count.
        norms = functools.partial(
            divergence.norms,
            grad_accum_steps=self.config.grad_accum_steps,
            seed=self.config.seed,
            transform=_transform(self.config, self.cache),
        )
        batch = self.replicas.shard(next(self.feed.train(step)))
        bare = self.replicas.replicate(state.replace(step=np.int32(step), opt_state=(), outer=()))
        found = jax.device_get(self.replicas.pmap(norms)(bare, batch))
        rows = divergence.by_layer(found)
        positions = self.feed.positions(step)
        self.display.table(
            "Diverged", report.diagnosis(trouble.step, found["loss"], positions, rows)
        )
        path = self.workdir / "diagnosis.json"
        if parallel.is_main():
            values = {"step": trouble.step, "reason": trouble.reason, "loss": found["loss"].item()}
            values |= {"sequences_begin_at_tokens": positions, "norms": rows}
            # JSON has neither infinity nor NaN, which here are what matters: they become strings.
            values = json.loads(json.dumps(values), parse_constant=str)
            configs.write_whole(path, json.dumps(values, indent=2) + "\n")
        return RunError(
            f"diverged at step {trouble.step}: {trouble.reason}, after {self.judge.rollbacks} "
            f"roll-backs; {path} names the data and the norms of each layer: lower "
            "optimizer.learning_rate, or raise divergence.max_rollbacks, and run again to go on "
            "from the newest checkpoint"
        )

    def _evaluate(self, done: int, state: Any) -> Evaluation:
        """Evaluates on the validation split, and logs the result."""
        before = time.perf_counter()
        batches = self.watchdog.each(self.feed.evaluation(), "evaluating", done)
        evaluation = evaluate(self.p_eval_step, state.params, batches, self.replicas)
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

    def finish(self, result: Result) -> None:
        """Returns when all is on disk; raises RunError, in all processes, where it can't be."""
        unsaved, unwritten = self.checkpoints.finish(result.state), self.writer.finish()
        text = "; ".join(filter(None, (unsaved, unwritten)))
        if text:
            rest = ", and run again to go on from there" if unsaved else "; all else is saved"
            text += f": make room in {self.workdir}{rest}"
        text = parallel.from_main(text)
        if text:
            raise RunError(text)

    def summarise(self, result: Result) -> None:
        """Shows a sample of text, what was reached, and where everything lies."""
        self.display.stop()
        sampling_wanted = self.config.objective == "causal" and self.config.sample.num_tokens
        if result.finished and sampling_wanted and parallel.is_main():
            text = self._sample(result.state.params)
            self.display.text("Sample", text)
            self.writer.write_text(result.step, "sample", text)
        rows = report.summary(self.config, self.workdir, self.cache, result, self.display.seconds())
        rows |= report.agreement(self.program, result.state, self.replicas.device_count)
        if self.judge.skipped or self.judge.rollbacks:
            rows["diverged"] = (
                f"{self.judge.skipped:,} updates skipped, {self.judge.rollbacks} roll-backs"
            )
        title = "Finished" if result.finished else "Stopped as asked; run again to go on"
        self.display.table(title, rows)

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


def _describe(config: ConfigDict, workdir: Path, cache: TokenCache) -> None:
    configs.save(config, workdir / "config.json")
    configs.write_whole(workdir / "tokenizer.json", cache.tokenizer.to_str(pretty=True))


def _with_steps(config: ConfigDict, tokens: int) -> ConfigDict:
    """The config with num_train_steps as num_epochs asks for it."""
    if config.num_epochs == 0:
        return config
    config = config.copy_and_resolve_references()
    config.num_train_steps = pipeline.steps_in(
        config.num_epochs, tokens, config.seq_len, config.global_batch_size
    )
    if config.num_train_steps > MOST:
        raise ConfigError(
            f"num_epochs={config.num_epochs} are {config.num_train_steps} steps, too many: give a "
            "smaller number, or more sequences to a step by global_batch_size"
        )
    configs.validate(config)
    return config
