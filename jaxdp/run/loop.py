"""The training loop: from a config to a trained model."""

import contextlib
import importlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common import paths
from jaxdp.common.errors import Stopped
from jaxdp.common.stopping import StopRequest
from jaxdp.common.terminal import Display
from jaxdp.data import eval_sets
from jaxdp.data.cache import open_cache
from jaxdp.data.feed import Feed
from jaxdp.parallel import failures, messages, processes
from jaxdp.parallel.agreement import Agreement
from jaxdp.parallel.replicas import Replicas
from jaxdp.run import consistency, preflight, report, resuming, same_run, workdir_access
from jaxdp.run.evaluation import Evaluations
from jaxdp.run.result import Result
from jaxdp.run.rollback import roll_back
from jaxdp.run.session import Run
from jaxdp.run.summary import summarise
from jaxdp.run.watchdog import Watchdog
from jaxdp.step.setup import Setup, batch_sizes, resolve_steps, setup_of_feeds, validate
from jaxdp.step.state import State, abstract_state, saved_shapes
from jaxdp.workdir import wandb_run


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains a model, or resumes from the workdir's newest checkpoint.

    Args:
      config: a config with the keys of configs/default.py.
      workdir: folder for config.json, metrics.jsonl, tensorboard/, checkpoints/, tokenizer.json.
      devices: the devices to train on; all by default.
      stop_requested: called before each round of training and each batch of an evaluation; if true
        in any process, all of them save and return.

    Raises:
      ConfigError: the config, the data or the workdir can't be used; nothing was changed.
      Stopped: asked to stop before the run began.
    """
    validate(config)
    workdir = paths.local("--workdir", workdir)
    return train_valid(config, workdir, StopRequest(stop_requested), devices=devices)


def train_valid(
    config: ConfigDict,
    workdir: str | Path,
    request: StopRequest,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Result:
    """Trains like `train`, with a config that `validate` has accepted, until requested to stop."""
    workdir, replicas, display = Path(workdir), Replicas(devices), Display(not processes.is_main())

    def say(line: str) -> None:
        request.check()
        display.line(line)

    with Agreement(request) as agreement:
        setup = None
        with contextlib.suppress(Stopped), request.interruptible():
            setup = _prepare(config.copy_and_resolve_references(), workdir, replicas, say)
        agreement.start_together(setup is not None)
        assert setup is not None
        consistency.check(setup, workdir)
        request.when = "after this step"
        result = _train_prepared(setup, workdir, replicas, display, agreement)
    return result or train_valid(config, workdir, request, devices=devices)


def _train_prepared(
    setup: Setup, workdir: Path, replicas: Replicas, display: Display, agreement: Agreement
) -> Result | None:
    """Trains with a setup; returns None if its place in the data turns out to be another one."""
    config = setup.config
    watchdog = Watchdog(config.hang_seconds)
    threading.Thread(target=_import_tensorflow).start()
    with workdir_access.locked(workdir, display.line), failures.explaining_lost_peers(), watchdog:
        if config.wandb_project:
            messages.on_main(lambda: wandb_run.check(config))
        workdir_access.check_disk(
            workdir,
            saved_shapes(abstract_state(setup), setup.method, setup.islands),
        )
        with Run(setup, workdir, replicas, display, watchdog, agreement) as run:
            start, state = run.restore()
            if run.origin == setup.feed.origin:
                return _train(run, start, state)
    # The newest checkpoint is damaged, and lies elsewhere by now: the run's length was computed
    # from its place in the data.
    return None


def _prepare(
    config: ConfigDict, workdir: Path, replicas: Replicas, say: Callable[[str], None]
) -> Setup:
    """Opens the data, checks everything before anything is compiled, and returns the setup.

    Args:
      config: a valid config; values that it leaves open are filled in in place.
      workdir: the run's folder; created if it doesn't exist.
      replicas: the devices.
      say: called with a line of text before something slow.

    Raises:
      ConfigError: the data, the workdir or the config can't be used.
    """
    say(f"Opening {config.data.path} ...")
    consistency.check_devices()
    counts = jax.process_count(), replicas.device_count
    batch_sizes(config, *counts)
    workdir_access.check_workdir(workdir)
    preflight.check_init(config, workdir)
    if (workdir / "config.json").exists():
        saved = configs.load(workdir / "config.json")
        preflight.take_vocabulary(config, saved)
        same_run.check(config, saved)
    eval_sets.check(config)
    cache = open_cache(config, say)
    feed = Feed(config, cache, resuming.newest_position(workdir, config, say))
    preflight.check_data(feed, say)
    preflight.check_init(config, workdir, feed.cache.vocab_size, say)
    preflight.say_of_trained_sets(config, say)
    feeds = {"": feed} | preflight.open_eval_sets(config, feed.cache, say)
    resolve_steps(config, feed, say)
    setup = setup_of_feeds(feeds, replicas.device_count, jax.process_count())
    preflight.check_memory(setup)
    preflight.check_delay(setup)
    return setup


def _train(run: Run, start: int, state: State) -> Result:
    run.show_header()
    if run.over(start) and not run.unevaluated:
        run.display.line(report.already_finished(run.config, start, run.stopping))
        return Result(start, True, {}, state)
    if start:
        run.say_where_it_goes_on()
    run.begin(start)
    with contextlib.closing(run.rounds):
        result = train_steps(run, state, start)
    run.finish(result)
    summarise(run, result)
    return result


def train_steps(run: Run, state: State, start: int) -> Result:
    """Trains from step `start` to the end, or until asked to stop.

    Data parallelism, round by round: each device takes its part of the batch, runs forward and
    backward, synchronises with the others, and updates its parameters.

    A step is saved before it is evaluated, so that an evaluation that dies loses nothing. If a run
    ends between the two, it evaluates that step first when it resumes. A run that is asked to stop
    dispatches no more rounds, and leaves an evaluation to the resumed run.
    """
    evaluations: Evaluations = run.evaluate(start, state) if run.unevaluated else {}
    rounds, done = run.rounds, start
    while not (run.over(done) or run.asked_to_stop()):
        before, evaluations = done, {}
        new = rounds.compile(done, state)
        batch = rounds.fetch(done)
        if run.asked_to_stop():  # What is dispatched can't be taken back.
            break
        done, state = rounds.train(done, state, batch, new)
        run.checkpoints.check()

        evaluating, saving = run.due(done)
        if run.judge.trouble is None and (evaluating or saving):
            run.log.read()
        if run.judge.trouble:
            done, state = roll_back(run, state)
            rounds.seek(done)
            evaluating, saving = run.due(done)
        ended = run.over(done)

        run.check_replicas(before, done, state, always=ended or saving or evaluating)
        # After a skipped update the parameters may be bad: they don't replace good ones.
        if ended or (saving and run.judge.in_a_row == 0):
            run.save(done, state, evaluating)
        if evaluating:
            evaluations = run.evaluate(done, state)
        if run.stopping.over and run.saved != done:
            run.save(done, state, evaluating=False)
    if run.stopped:
        done, state = _stop(run, done, state)
    return Result(done, run.over(done) and not run.unevaluated, evaluations, state)


def _stop(run: Run, done: int, state: State) -> tuple[int, State]:
    """Saves the state after `done` steps for the next start, unless that has been done."""
    run.log.read()
    if run.judge.trouble:
        done, state = roll_back(run, state)
    if run.saved != done:
        run.check_replicas(done, done, state, always=True)
        run.save(done, state, evaluating=run.due(done)[0] and run.evaluated != done)
    return done, state


def _import_tensorflow() -> None:
    """Imports TensorFlow, which takes seconds, in a thread beside the compilation of the step.

    TFDS is left out, because its import breaks imports in other threads. Errors are raised where
    the module is imported again for use.
    """
    with contextlib.suppress(Exception):
        importlib.import_module("jaxdp.data.tensorflow")
