"""A folder for damaged checkpoints, beside the folder of the good ones."""

import functools
from collections.abc import Callable
from pathlib import Path

from jaxdp.common.errors import ConfigError
from jaxdp.parallel import messages


class Aside:
    """Moves damaged checkpoints out of a run's way, never deletes them, and can move them back."""

    def __init__(self, folder: Path, report: Callable[[str], None]):
        """Takes the checkpoints' folder, and what to call with a line of text for each move."""
        self._folder, self._report = folder, report
        self._moved: list[tuple[Path, int]] = []

    def move(self, damaged: dict[int, str]) -> None:
        """Moves damaged checkpoints, {step: what is wrong}; all processes have to call this.

        Raises:
          ConfigError: one can't be moved.
        """
        if not damaged:
            return
        messages.barrier()
        for step, wrong in damaged.items():
            self._report(f"Checkpoint {step} is damaged ({wrong}).")
            messages.on_main(functools.partial(self._move, step))

    def _move(self, step: int) -> None:
        aside = self._folder.with_name(f"{self._folder.name}-damaged")
        try:
            aside.mkdir(exist_ok=True)
            number = sum(path.name.split(".")[0] == str(step) for path in aside.iterdir())
            target = aside / (f"{step}.{number}" if number else str(step))
            self._moved.append(((self._folder / str(step)).rename(target), step))
        except OSError as error:
            raise ConfigError(
                f"checkpoint {step} is damaged and can't be moved to {aside} ({error.strerror}): "
                "move it away, or use another --workdir"
            ) from None
        self._report(f"It was moved to {target}.")

    def keep(self) -> None:
        """Forgets the moves so far: `put_back` no longer undoes them."""
        self._moved = []

    def put_back(self) -> None:
        """Moves checkpoints back that were moved: a run that can't start changes nothing."""
        for path, step in self._moved:
            path.rename(self._folder / str(step))
            self._report(f"{path} was moved back.")
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
        self._moved = []
