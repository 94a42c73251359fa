"""A run, from a config to a trained model."""

import contextlib
import functools
import importlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common.choices import MOST
from jaxdp.common.config import BatchSizes
from jaxdp.common.errors import ConfigError
from jaxdp.common.terminal import Display
from jaxdp.data import eval_sets, feed, tokenizer
from jaxdp.data.cache import TokenCache, open_cache
from jaxdp.data.eval_sets import Split
from jaxdp.huggingface import load
from jaxdp.model.transformer import ModelConfig, Transformer
from jaxdp.parallel import processes
from jaxdp.parallel.replicas import Replicas
from jaxdp.run import preflight, report
from jaxdp.run.divergence import Divergence
from jaxdp.run.early_stopping import Stopping
from jaxdp.run.evaluation import Evaluations
from jaxdp.run.session import Result, Run
from jaxdp.run.watchdog import Watchdog
from jaxdp.step.objective import get_objective
from jaxdp.step.optimizer import get_optimizer, get_schedule
from jaxdp.step.program import Program
from jaxdp.step.train_step import create_state, saved_shapes
from jaxdp.workdir.checkpoints import Checkpoints
from jaxdp.workdir.metrics import MetricsWriter


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
    workdir, replicas, display = Path(workdir), Replicas(devices), Display(not processes.is_main())
    sizes = configs.batch_sizes(config, jax.process_count(), replicas.device_count)
    preflight.check_workdir(workdir)
    preflight.check_init(config, workdir)
    if (workdir / "config.json").exists():
        configs.check_same_run(config, configs.load(workdir / "config.json"))
    eval_sets.find(config)
    cache = open_cache(config, display.line)
    preflight.check_data(config, cache)
    preflight.check_init(config, workdir, cache.vocab_size)
    sets = preflight.open_eval_sets(config, cache, display.line)
    config = _with_steps(config, cache)
    preflight.check_memory(config, ModelConfig.from_config(config, cache.vocab_size), sizes)
    preflight.create_workdir(workdir)
    watchdog = Watchdog(config.hang_seconds)
    threading.Thread(target=_import_tensorflow).start()
    with preflight.locked(workdir), processes.others_needed(), watchdog:
        return _train(
            config, workdir, replicas, sizes, cache, sets, display, watchdog, stop_requested
        )


def _train(
    config: ConfigDict,
    workdir: Path,
    replicas: Replicas,
    sizes: BatchSizes,
    cache: TokenCache,
    sets: dict[str, Split],
    display: Display,
    watchdog: Watchdog,
    stop_requested: Callable[[], bool],
) -> Result:
    model = Transformer(ModelConfig.from_config(config, cache.vocab_size))
    schedule = get_schedule(config)
    objective = get_objective(config, cache.vocab_size, tokenizer.mask_id(cache.tokenizer))
    program = Program(config, replicas, schedule, objective)
    optimizer = get_optimizer(config, schedule)
    shapes = saved_shapes(model, optimizer, program.method, replicas.device_count)
    preflight.check_disk(workdir, shapes)
    new_state = functools.partial(
        create_state, model, optimizer, config.seed, replicas, program.method
    )
    read = functools.partial(load.read, config.init_from, model.config)
    first_state = functools.partial(new_state, read) if config.init_from else new_state
    state, judge, stopping = new_state(), Divergence(config), Stopping(config)
    with Checkpoints(workdir, config, replicas, program.method, display.line) as checkpoints:
        same = functools.partial(preflight.same_tokens, config, cache)
        start, found = 0, checkpoints.restore(state, same)
        if found is not None:
            start, extra, state = found
            judge.load(extra["divergence"])
            stopping.load(extra.get("stopping", {}))
        elif config.init_from:
            del state  # There is room for one.
            state = first_state()
            display.line(f"Starting from the weights of {config.init_from}.")
        traffic = report.traffic(config, program.traffic(state), replicas.device_count)
        header = report.header(config, workdir, replicas, sizes, cache, sets, state.params)
        display.table("jaxdp", header | traffic)
        if start >= config.num_train_steps or stopping.over:
            display.line(report.already_finished(start, stopping))
            return Result(start, True, {}, state)
        if found is not None:
            display.line(f"Going on after step {start:,}.")
        processes.on_main(functools.partial(_describe, config, workdir, cache))
        with MetricsWriter(workdir, config, start, active=processes.is_main()) as writer, display:
            run = Run(
                config,
                workdir,
                replicas,
                sizes,
                cache,
                sets,
                model,
                first_state,
                program,
                judge,
                stopping,
                display,
                checkpoints,
                writer,
                watchdog,
                objective,
                stop_requested,
            )
            with contextlib.closing(program), contextlib.closing(run.profile):
                result = _steps(run, state, start)
            watchdog.beat("writing the last checkpoint", result.step, slow=True)
            run.finish(result)
            watchdog.beat("summarising", result.step, slow=True)
            run.summarise(result)
            return result


def _steps(run: Run, state: Any, start: int) -> Result:
    """Trains from `start` to the end, or until asked to stop."""
    total = run.config.num_train_steps
    rounds = run.rounds(start)
    run.start_clock(start, state)
    run.display.line("Compiling the training step ...")
    done, pending, stop, finished = start, None, False, False
    evaluations: Evaluations = {}

    while not stop:
        new, steps = run.program.is_new(done), run.program.round_length(done)
        if new:
            run.watchdog.beat("compiling a step", done, slow=True)
            shapes = feed.round_shapes(run.config, steps, run.sizes.per_device)
            run.program.compile(done, state, run.replicas.zeros(shapes))
        run.watchdog.beat("waiting for data", done)
        asked = time.perf_counter()
        batch = next(rounds)
        waited = time.perf_counter() - asked
        run.watchdog.beat("training", done, slow=new)
        with run.profile.round(done, state, new):
            state, metrics = run.program(done, state, batch)
        # A round's figures are read after the next is dispatched, so that the devices never
        # wait for Python. More than two steps in flight can deadlock CPU devices.
        dispatched = time.perf_counter()
        if pending is not None:
            stop = run.log(*pending)
        if new:
            jax.block_until_ready(metrics)
            run.display.line(f"Compiled: {report.collectives(run.program)}.")
            # The time of this round is that of compilation.
            run.throughput.start(steps=-steps)
        if done == start:
            run.display.start(start, total)
        if run.program.trace(metrics) or run.profile.stop(done + steps, metrics):
            run.throughput.start(steps=-steps)
        run.busy = dispatched - asked
        run.checkpoints.check()
        first, done, pending = done, done + steps, (done, metrics, waited)

        evaluating, saving = run.due(done)
        if run.judge.trouble is None and (stop or evaluating or saving):
            stop = run.log(*pending) or stop
            pending = None
        if run.judge.trouble:
            # What was dispatched since is forgotten: where it ended must not depend on that.
            before = time.perf_counter()
            done, state = run.roll_back(state)
            run.throughput.pause(time.perf_counter() - before)
            rounds, pending = run.rounds(done), None
            evaluating, saving = run.due(done)
        evaluations = run.evaluate(done, state) if evaluating else {}
        finished = done == total or run.stopping.over
        stop = stop or finished
        if run.check_is_due(first, done) or stop or saving:
            run.check_replicas(done, state)
        # Parameters in doubt don't take the place of good ones.
        if stop or (saving and run.judge.in_a_row == 0):
            run.save(done, state, evaluations)
    return Result(done, finished, evaluations, state)


def _import_tensorflow() -> None:
    """It takes seconds, in which a step can be compiled: the first batch is not needed before.

    Not TFDS, which harms what other threads import meanwhile. What goes wrong is raised where it is
    imported again, to be used.
    """
    with contextlib.suppress(Exception):
        importlib.import_module("jaxdp.data.tensorflow")


def _describe(config: ConfigDict, workdir: Path, cache: TokenCache) -> None:
    configs.save(config, workdir / "config.json")
    configs.write_whole(workdir / "tokenizer.json", cache.tokenizer.to_str(pretty=True))


def _with_steps(config: ConfigDict, cache: TokenCache) -> ConfigDict:
    """The config with num_train_steps as num_epochs asks for it."""
    if config.num_epochs == 0:
        return config
    if len(cache.train_borders) > 1:
        raise ConfigError(
            f"num_epochs={config.num_epochs} has no meaning with several sources in data.path: set "
            "num_train_steps"
        )
    config = config.copy_and_resolve_references()
    config.num_train_steps = feed.epoch_steps(config, cache)
    if config.num_train_steps > MOST:
        raise ConfigError(
            f"num_epochs={config.num_epochs} are {config.num_train_steps} steps, too many: give a "
            "smaller number, or more sequences to a step by global_batch_size"
        )
    configs.validate(config)
    return config
