"""The run in Weights & Biases (wandb) that a workdir's metrics are sent to."""

import contextlib
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxdp.common.errors import ConfigError, shown
from jaxdp.common.files import first_line, write_atomically

FILE = "wandb_run.json"
FINISH_SECONDS = 60  # How long the end of a run waits for the server.


def check(config: ConfigDict) -> None:
    """Refuses a run that is to be sent to a server without a key; at a terminal, wandb asks for it.

    A server that doesn't answer is left to `WandbRun`.
    """
    import wandb

    try:
        wandb.login()
    except wandb.errors.UsageError as error:
        raise ConfigError(
            f"wandb_project={shown(config.wandb_project)}: {shown(error, as_text=str)} Or set "
            "WANDB_API_KEY, or WANDB_MODE=offline"
        ) from None
    except Exception:  # wandb raises errors of its own, and those of its libraries.
        return


def run_id(workdir: Path, say: Callable[[str], None]) -> str:
    """Returns the id of a workdir's run, which a restart finds again; a copy gets one of its own.

    Args:
      workdir: an existing folder.
      say: called with a line of text if the workdir is a copy.
    """
    path, here = workdir / FILE, str(workdir.resolve())
    found = _read(path)
    if found and found["workdir"] != here and _read(Path(found["workdir"]) / FILE) == found:
        say(f"This workdir is a copy of {found['workdir']}: it becomes a wandb run of its own.")
        found = None
    found = {"id": found["id"] if found else uuid.uuid4().hex[:12], "workdir": here}
    if found != _read(path):
        write_atomically(path, json.dumps(found) + "\n")
    return found["id"]


def _read(path: Path) -> dict[str, str] | None:
    """Reads the file with the id; returns None if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: str(found[key]) for key in ("id", "workdir")}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


class WandbRun:
    """Sends metrics to wandb; whatever fails there, the training goes on, and says so."""

    def __init__(self, workdir: Path, config: ConfigDict, say: Callable[[str], None]):
        """Starts a run, or resumes the workdir's run; offline if the server can't be reached.

        Args:
          workdir: the folder of the run.
          config: a config with the keys of configs/default.py.
          say: called with a line of text about what fails.
        """
        import wandb

        self._say, self._told, self._teardown = say, False, wandb.teardown
        self._folder = workdir / "wandb"
        options: dict[str, Any] = {
            "project": config.wandb_project,
            "dir": workdir,
            "config": config.to_dict(),
            "id": run_id(workdir, say),
            "name": workdir.resolve().name,
            "resume": "allow",
            "settings": wandb.Settings(finish_timeout=FINISH_SECONDS),
        }
        self._run: Any = None
        try:
            self._run = wandb.init(**options)
        except Exception as error:  # As above; the server can refuse, be slow, or be away.
            say(
                f"wandb can't be used ({first_line(error)}): training goes on, and logs for it in "
                f"{self._folder}; send that later with wandb sync FOLDER."
            )
            self._call(wandb.teardown)  # Its service still holds the id.
            self._run = self._call(wandb.init, **options, mode="offline")
        # Asks wandb's service; steps before this one would be ignored.
        self._first = self._call(lambda: self._run.step if self._run else 0) or 0

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Logs the values of a step; after a failure, no more are logged."""
        if self._run is None:
            return
        if step >= self._first:
            self._call(self._run.log, dict(values), step=step)
        elif not self._told:
            self._told = True
            self._say(
                f"wandb has this run up to step {self._first - 1:,} already, and can't replace "
                "that: until then its curves are those of before; metrics.jsonl has the new ones."
            )

    def finish(self) -> None:
        """Ends the run; waits FINISH_SECONDS at most for what is still to be sent."""
        if self._run is not None:
            self._call(self._run.finish)

    def _call(self, function: Callable, *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except Exception as error:
            self._run = None
            self._say(
                f"wandb has failed ({first_line(error)}): training goes on without it; what it has "
                f"until now is in {self._folder}."
            )
            with contextlib.suppress(Exception):  # Else it would print a traceback at the end.
                self._teardown()
            return None
