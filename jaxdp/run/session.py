"""A run under way: what the loop does at its steps, and the parts that it shares.

The loop itself is in `loop`.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common.config import BatchSizes
from jaxdp.common.errors import RunError
from jaxdp.common.terminal import Display
from jaxdp.data import tokenizer
from jaxdp.data.cache import TokenCache
from jaxdp.data.eval_sets import Split
from jaxdp.data.feed import Feed
from jaxdp.data.sequences import Batch
from jaxdp.model import sampling
from jaxdp.model.transformer import Transformer, flops_per_token, num_parameters
from jaxdp.parallel import processes
from jaxdp.parallel.replicas import Replicas, prefetch
from jaxdp.run import divergence, report
from jaxdp.run.divergence import Divergence, Trouble
from jaxdp.run.early_stopping import Stopping
from jaxdp.run.evaluation import Evaluation, Evaluations, compiled, evaluate_all, figures
from jaxdp.run.profiling import Profile
from jaxdp.run.watchdog import Watchdog
from jaxdp.step.objective import Objective
from jaxdp.step.program import Program
from jaxdp.sync.fingerprints import ReplicaCheck
from jaxdp.workdir.checkpoints import Checkpoints
from jaxdp.workdir.metrics import MetricsWriter, Throughput, load_balance


@dataclasses.dataclass(frozen=True)
class Result:
    """What has become of a run.

    Attributes:
      step: optimizer steps done in all.
      finished: whether these are all, or it stopped early; if not, it was asked to stop, and has
        saved.
      evaluations: of the last step, where this call evaluated it; see `evaluation.Evaluations`.
      state: the last one, replicated over the devices.
    """

    step: int
    finished: bool
    evaluations: Evaluations
    state: Any

    @property
    def evaluation(self) -> Evaluation | None:
        """On the validation split, of the last step, where this call evaluated it."""
        return self.evaluations.get("")

    def __repr__(self) -> str:
        """Without the state, whose arrays would fill a notebook."""
        loss = f", validation_loss={self.evaluation.loss:.4f}" if self.evaluation else ""
        return f"Result(step={self.step}, finished={self.finished}{loss})"


@dataclasses.dataclass
class Run:
    """A run under way: what its steps, evaluations and checkpoints share."""

    config: ConfigDict
    workdir: Path
    replicas: Replicas
    sizes: BatchSizes
    cache: TokenCache
    eval_sets: dict[str, Split]
    model: Transformer
    first_state: Callable[[], Any]
    program: Program
    judge: Divergence
    stopping: Stopping
    display: Display
    checkpoints: Checkpoints
    writer: MetricsWriter
    watchdog: Watchdog
    objective: Objective
    stop_requested: Callable[[], bool]

    def __post_init__(self) -> None:
        self.p_eval_step = compiled(self.model, self.objective, self.replicas)
        self.feed = Feed(self.config, self.cache)
        self.tokenizer_digest = tokenizer.digest(self.cache.tokenizer)
        self.replica_check = ReplicaCheck(self.replicas)
        self.profile = Profile(self.config, self.workdir, self.display.line)
        self.busy = 0.0  # Seconds that this process was last busy with a step, not with waiting.

    def start_clock(self, done: int, state: Any) -> None:
        """Begins to measure the speed after so many steps."""
        self.profile.start(done)
        flops = flops_per_token(self.model.config, num_parameters(state.params))
        self.throughput = Throughput(flops, self.replicas.device_count)

    def due(self, done: int) -> tuple[bool, bool]:
        """Whether to evaluate and whether to save after so many steps."""
        last = done == self.config.num_train_steps
        evaluating = done % self.config.eval_every == 0 or last
        return evaluating, done % self.config.checkpoint.every == 0 or last

    def rounds(self, start: int) -> Iterator[Any]:
        """The batches of rounds from `start` on, on the devices."""
        return prefetch(self._host_rounds(start), self.replicas.shard_steps)

    def _host_rounds(self, start: int) -> Iterator[list[Batch]]:
        """This process's batches, round by round.

        With each go whether the process was asked to stop, and how long it was busy with a step.
        """
        batches = self.feed.train(start)
        done = start
        while done < self.config.num_train_steps:
            steps = self.program.round_length(done)
            said = {
                "stop": np.full(self.sizes.per_host, self.stop_requested(), np.float32),
                "busy": np.full(self.sizes.per_host, self.busy, np.float32),
            }
            yield [batch | said for batch in itertools.islice(batches, steps)]
            done += steps

    def check_is_due(self, before: int, done: int) -> bool:
        """Whether replicas are to be compared after the steps before + 1 .. done."""
        every = self.config.sync.check_every
        return every > 0 and before // every < done // every

    def check_replicas(self, done: int, state: Any) -> None:
        """Stops the run where a device holds another state than the others."""
        if self.config.sync.check_every and self.replicas.device_count > 1:
            shared = {"params": state.params, "outer": state.outer}
            if not self.program.method.own_opt_state:
                shared["opt_state"] = state.opt_state
            if not self.program.method.own_ema:
                shared["ema"] = state.ema
            self.watchdog.beat("comparing replicas", done)
            self.replica_check(shared, done)

    def log(self, before: int, metrics: dict[str, jax.Array], waited: float) -> bool:
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

    def roll_back(self, state: Any) -> tuple[int, Any]:
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
        step, extra, state = found or (0, {}, self.first_state())
        self.stopping.load(extra.get("stopping", {}))  # Evaluations since were of what is given up.
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

    def _diagnosis(self, trouble: Trouble, state: Any) -> RunError:
        """Shows and writes what is known of a step that the run can't get past."""
        self.watchdog.beat("looking for the cause", trouble.step, slow=True)
        found = divergence.diagnose(
            self.config, self.replicas, self.feed, self.objective, trouble, state
        )
        self.display.table("Diverged", report.diagnosis(found))
        path = self.workdir / "diagnosis.json"
        if processes.is_main():
            # JSON has neither infinity nor NaN, which here are what matters: they become strings.
            values = json.loads(json.dumps(found), parse_constant=str)
            configs.write_whole(path, json.dumps(values, indent=2) + "\n")
        return RunError(
            f"diverged at step {trouble.step}: {trouble.reason}, after {self.judge.rollbacks} "
            f"roll-backs; {path} names the data and the norms of each layer: lower "
            "optimizer.learning_rate, or raise divergence.max_rollbacks, and run again to go on "
            "from the newest checkpoint"
        )

    def evaluate(self, done: int, state: Any) -> Evaluations:
        """Evaluates on the validation split and the sets beside it, and logs the results."""
        before = time.perf_counter()
        watch = functools.partial(self.watchdog.each, doing="evaluating", done=done)
        params = self.program.to_evaluate(state)
        splits = {"": Split(self.config, self.cache)} | self.eval_sets
        found = evaluate_all(self.p_eval_step, params, splits, self.replicas, watch)
        self.writer.write(done, figures(found))
        for name, evaluation in found.items():
            self.display.line(report.evaluated(done, evaluation, name), "bold")
        self.stopping.add(done, found[""].loss)
        ends = done == self.config.num_train_steps or self.stopping.over
        if self.config.sample.at_eval and not ends:  # At the end it is shown, too.
            self._sample(done, params)
        self.throughput.pause(time.perf_counter() - before)
        return found

    def save(self, done: int, state: Any, evaluations: Evaluations) -> None:
        """Starts to save a checkpoint; all figures until then go to disk, too."""
        self.watchdog.beat("saving", done, slow=True)
        self.writer.flush()
        extra = {
            "digest": self.cache.digest,
            "tokenizer": self.tokenizer_digest,
            "divergence": self.judge.to_json(),
            "stopping": self.stopping.to_json(),
        }
        loss = evaluations[""].loss if evaluations else None
        self.checkpoints.save(done, state, extra, loss)

    def finish(self, result: Result) -> None:
        """Returns when all is on disk; raises RunError, in all processes, where it can't be."""
        unsaved, unwritten = self.checkpoints.finish(result.state), self.writer.finish()
        text = "; ".join(filter(None, (unsaved, unwritten)))
        if text:
            rest = ", and run again to go on from there" if unsaved else "; all else is saved"
            text += f": make room in {self.workdir}{rest}"
        text = processes.from_main(text)
        if text:
            raise RunError(text)

    def summarise(self, result: Result) -> None:
        """Shows a sample of text, what was reached, and where everything lies."""
        self.display.stop()
        if result.finished:
            text = self._sample(result.step, self.program.to_evaluate(result.state))
            if text:
                self.display.text("Sample", text)
        rows = report.summary(self.config, self.workdir, result, self.display.seconds())
        rows |= report.agreement(self.program, result.state, self.replicas.device_count)
        if result.finished and result.step < self.config.num_train_steps:
            rows["stopped early"] = self.stopping.reason()
        if self.judge.skipped or self.judge.rollbacks:
            rows["diverged"] = (
                f"{self.judge.skipped:,} updates skipped, {self.judge.rollbacks} roll-backs"
            )
        title = "Finished" if result.finished else "Stopped as asked; run again to go on"
        self.display.table(title, rows)

    def _sample(self, done: int, params: Any) -> str:
        """Shows a sample of text in TensorBoard and returns it; nothing where none is wanted."""
        wanted = self.config.objective == "causal" and self.config.sample.num_tokens
        if not wanted or not processes.is_main():
            return ""
        self.watchdog.beat("sampling", done, slow=True)
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
        text = self.cache.tokenizer.decode([*prompt, *ids], skip_special_tokens=False)
        self.writer.write_text(done, "sample", text)
        return text
