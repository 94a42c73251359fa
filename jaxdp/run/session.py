"""The parts of a run (devices, data, checkpoints, metrics), and the phases of its loop.

The loop itself is `loop.train_steps`.
"""

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxdp.common.errors import ConfigError, RunError, Stopped
from jaxdp.common.files import way_out
from jaxdp.common.terminal import Display
from jaxdp.data import tokenizer
from jaxdp.data.batch import Batch
from jaxdp.data.pipeline import Position
from jaxdp.huggingface import load
from jaxdp.model.flops import flops_per_token
from jaxdp.model.transformer import num_parameters, parameter_shapes
from jaxdp.parallel import messages, processes
from jaxdp.parallel.agreement import Agreement
from jaxdp.parallel.replicas import Replicas
from jaxdp.run import consistency, preflight, report, resuming, sampled
from jaxdp.run.divergence import Divergence
from jaxdp.run.early_stopping import EarlyStopping
from jaxdp.run.evaluation import Evaluations, evaluate_all, figures
from jaxdp.run.figures import MeanLoss, Throughput
from jaxdp.run.profiling import Profile
from jaxdp.run.result import Result
from jaxdp.run.rounds import Rounds
from jaxdp.run.step_log import StepLog
from jaxdp.run.watchdog import Watchdog
from jaxdp.step.program import Program, pmapped_evaluation
from jaxdp.step.setup import Setup
from jaxdp.step.state import State, abstract_state, create_state, fields_of, per_device_fields
from jaxdp.sync.fingerprints import ReplicaCheck
from jaxdp.workdir import finished, integrity
from jaxdp.workdir.checkpoints import Checkpoints, folder_of
from jaxdp.workdir.metrics import MetricsWriter


class Run:
    """A run in progress, for the length of a `with` block.

    Attributes:
      stopped: whether all processes stop here, because one of them was asked to.
      saved: the step whose state was last saved, or restored.
      evaluated: the step that was last evaluated; None before.
      unevaluated: whether the newest checkpoint was saved before its evaluation, which is to come.
      origin: the position in the data at which the restored checkpoint was saved.
      log: the log of the training steps, from `begin` on.
      rounds: the rounds of training steps, from `begin` on.
    """

    def __init__(
        self,
        setup: Setup,
        workdir: Path,
        replicas: Replicas,
        display: Display,
        watchdog: Watchdog,
        agreement: Agreement,
    ):
        """Creates the parts of the run; compiles and writes nothing yet."""
        self.setup, self.config, self.workdir = setup, setup.config, workdir
        self.replicas, self.display, self.watchdog = replicas, display, watchdog
        self.program = Program(setup, replicas)
        saved = folder_of(workdir)
        self.judge = Divergence(setup.config)
        self.stopping = EarlyStopping(setup.config, lambda step: (saved / str(step)).is_dir())
        self.stopped = self.unevaluated = False
        self.saved: int | None = 0  # The state of step 0 needn't be saved.
        self.evaluated: int | None = None
        self.origin, self._changes = Position(), ""
        self._line: dict[str, Any] | None = None  # What was logged of an unevaluated step.
        self._agreement = agreement
        self._p_eval_step = pmapped_evaluation(setup, replicas)
        self._tokenizer_digest = tokenizer.digest(setup.feed.cache.tokenizer)
        self._replica_check = ReplicaCheck(replicas)
        self._loss = MeanLoss()
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        """Opens the workdir's checkpoints."""
        self.checkpoints = self._resources.enter_context(
            Checkpoints(self.workdir, self.setup, self.replicas, self.display.line)
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for background writes, and closes everything."""
        self._resources.close()

    # The start.

    def restore(self) -> tuple[int, State]:
        """Restores the newest checkpoint, or starts at step 0; returns steps done and the state."""
        feed = self.setup.feed
        same = functools.partial(preflight.check_tokens, feed)
        found = self.checkpoints.restore(abstract_state(self.setup), same)
        consistency.check_step(found[0] if found else 0)
        if found is None:
            state = self.first_state()
            if self.config.init_from:
                self.display.line(f"Starting from the weights of {self.config.init_from}.")
            return 0, state
        step, extra, state = found
        self.origin = resuming.position_of(self.workdir, self.config, step, extra)
        self._changes = resuming.changes(self.workdir, self.config, self.origin, extra)
        self.saved = step
        self.judge.load(extra["divergence"])
        self._loss.load(extra.get("loss", {}))
        self.unevaluated = self.load_evaluations(step, extra)
        self._line = extra["line"] if self.unevaluated else None
        return step, state

    def load_evaluations(self, step: int, extra: dict[str, Any]) -> bool:
        """Restores early stopping's state at a checkpoint; returns whether it lacks its evaluation.

        Args:
          step: the checkpoint's step.
          extra: the JSON saved with it. It has a "line" if the step hadn't been evaluated. If its
            evaluation was due, or is by today's config, and was made since, there is its loss.
        """
        self.stopping.load(extra.get("stopping", {}))
        if "line" not in extra:
            return False
        if found := self.checkpoints.evaluation(step):
            self.stopping.add(step, *found)
        return not found and (extra.get("evaluating", True) or self.due(step)[0])

    def first_state(self) -> State:
        """Creates the state of step 0: random parameters, or the weights that init_from names."""
        name, model = self.config.init_from, self.setup.model.config
        read = functools.partial(load.read, name, model) if name else None
        state = create_state(self.setup, self.replicas, read)
        if name:
            consistency.check_weights(name, state.params)
        return state

    def show_header(self) -> None:
        """Shows a table of what is about to be trained."""
        kind = self.replicas.devices[0].device_kind
        rows = report.header(self.setup, self.workdir, kind)
        rows |= report.traffic(self.config, self.program.traffic(), self.replicas.device_count)
        self.display.table("jaxdp", rows)

    def say_where_it_goes_on(self) -> None:
        """Says after which step a run goes on, and what has changed since it last started."""
        self.display.line(f"Going on after step {self.origin.step:,}.")
        if self._changes:
            self.display.line(self._changes, "bold")

    def begin(self, start: int) -> None:
        """Writes config and tokenizer, opens the metrics files, and starts to measure speed."""
        self.checkpoints.sweep()
        messages.on_main(
            lambda: finished.describe(self.workdir, self.config, self.setup.feed.cache)
        )
        self.watchdog.beat("opening the metrics", start, slow=True)
        main, say = processes.is_main(), self.display.line
        writer = MetricsWriter(self.workdir, self.config, start, main, self._line, say)
        self._writer = self._resources.enter_context(writer)
        self._resources.enter_context(self.display)
        parameters = num_parameters(parameter_shapes(self.setup.model))
        flops = flops_per_token(self.setup.model.config, parameters)
        throughput = Throughput(flops, self.replicas.device_count)
        self.log = StepLog(
            self.setup, self.judge, self.display, self._writer, throughput, self._loss
        )
        profile = Profile(self.config, self.workdir, start, self.display.line)
        self.rounds = Rounds(self.program, self.log, profile, self.display, self.watchdog, start)

    def asked_to_stop(self) -> bool:
        """Returns whether all processes stop here; all have to call this at the same points."""
        self.stopped = self.stopped or self._agreement.reached()
        return self.stopped

    # After a round.

    def due(self, done: int) -> tuple[bool, bool]:
        """Returns whether to evaluate, and whether to save a checkpoint, after `done` steps."""
        last = done == self.config.num_train_steps
        evaluating = done % self.config.eval_every == 0 or last
        # Where the best evaluation is what the run is for, each is saved, as any may be the best.
        saving = evaluating if self.config.stop.patience else last
        return evaluating, saving or done % self.config.checkpoint.every == 0

    def over(self, done: int) -> bool:
        """Returns whether no more steps are to be done after `done`."""
        return done >= self.config.num_train_steps or self.stopping.over

    def evaluate(self, done: int, state: State) -> Evaluations:
        """Evaluates on the validation split and each of eval_sets, and logs the results.

        If the run is asked to stop meanwhile, it ends before the next batch, and returns nothing.
        """
        before = time.perf_counter()

        def watch(items: Iterable[Batch]) -> Iterator[Batch]:
            for item in self.watchdog.each(items, "evaluating", done):
                if self.asked_to_stop():
                    raise Stopped
                yield item

        params = self.program.eval_params(state)
        try:
            found = evaluate_all(self._p_eval_step, params, self.setup.feeds, self.replicas, watch)
        except Stopped:
            return {}
        self.evaluated = done
        self._writer.write(done, figures(found))
        for name, evaluation in found.items():
            self.display.line(report.evaluated(done, evaluation, name), "bold")
        # The loss is recorded last: a run that finds it there doesn't evaluate again.
        self._writer.flush()
        own = found[""].loss, found[""].tokens
        self.checkpoints.evaluated(done, *own)
        self.unevaluated = False
        self.stopping.add(done, *own)
        if self.config.sample.at_eval and not self.over(done):  # The summary shows one, too.
            self.sample(done, params)
        self.log.throughput.pause(time.perf_counter() - before)
        return found

    def check_replicas(self, before: int, done: int, state: State, always: bool) -> None:
        """Compares the replicas if that is due; ends the run if their states differ.

        Args:
          before: steps done before the last round.
          done: steps done after it.
          state: the state after `done` steps.
          always: whether to compare them even if it isn't due.
        """
        every = self.config.sync.check_every
        due = every > 0 and (always or before // every < done // every)
        if due and self.replicas.device_count > 1:
            own = per_device_fields(self.setup.method) | {"step"}
            shared = {name: x for name, x in fields_of(state).items() if name not in own}
            self.watchdog.beat("comparing replicas", done)
            self._replica_check(shared, done)

    def save(self, done: int, state: State, evaluating: bool) -> None:
        """Starts to save a checkpoint; writes all metrics logged until then.

        Args:
          done: steps done.
          state: the state after them.
          evaluating: whether this step's evaluation is to come. The checkpoint holds the line of
            metrics that it completes; also where only a later start may want to evaluate.
        """
        self.watchdog.beat("saving", done, slow=True)
        line = self._writer.line(done)
        position = self.setup.feed.position(done)
        extra: dict[str, Any] = {
            "digest": self.setup.feed.cache.digest,
            "tokenizer": self._tokenizer_digest,
            "divergence": self.judge.to_json(),
            "stopping": self.stopping.to_json(),
            "loss": self._loss.to_json(),
            "micro": self.setup.sizes.micro,
            resuming.POSITION: list(position.taken),
            resuming.SHUFFLE: position.shuffle,
            "evaluating": evaluating,
            integrity.GOOD: done % self.config.checkpoint.every == 0 and self.judge.in_a_row == 0,
        }
        extra |= {} if self.evaluated == done else {"line": line}
        if not evaluating:
            self._writer.flush()
        self.unevaluated = evaluating
        if processes.is_main() and not (self.workdir / "config.json").exists():
            with contextlib.suppress(ConfigError, OSError):  # Then the checkpoint fails, too.
                self.workdir.mkdir(parents=True, exist_ok=True)
                finished.describe(self.workdir, self.config, self.setup.feed.cache)
        self.saved = done
        self.checkpoints.save(done, state, extra)

    # The end.

    def finish(self, result: Result) -> None:
        """Waits until everything is on disk; raises RunError in all processes if that fails."""
        self.watchdog.beat("writing the last checkpoint", result.step, slow=True)
        unsaved, unwritten = self.checkpoints.finish(result.state), self._writer.finish()
        text = "; ".join(filter(None, (unsaved, unwritten)))
        if text:
            rest = ", and run again to go on from there" if unsaved else "; all else is saved"
            text += f": {way_out(text)} (--workdir={self.workdir}){rest}"
        if text := messages.from_main(text):
            raise RunError(text)

    def sample(self, done: int, params: Any) -> str:
        """Samples text, shows it in TensorBoard and returns it; empty where none is configured."""
        if not sampled.is_wanted(self.config) or not processes.is_main():
            return ""
        self.watchdog.beat("sampling", done, slow=True)
        text = sampled.sample(self.setup, params)
        self._writer.write_text(done, "sample", text)
        return text
