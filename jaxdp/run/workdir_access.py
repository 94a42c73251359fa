"""Whether a run may use its workdir: kinds and owners of files, the lock, room on the disk."""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxdp.common import files, locks
from jaxdp.common.errors import ConfigError, check_text, shown
from jaxdp.common.terminal import in_bytes
from jaxdp.parallel import processes
from jaxdp.run import profiling
from jaxdp.workdir import integrity
from jaxdp.workdir.checkpoints import FOLDER
from jaxdp.workdir.metrics import JSONL
from jaxdp.workdir.saver import leftovers


def check_workdir(workdir: Path) -> None:
    """Refuses a workdir with a file in place of a folder that the run writes, or vice versa.

    And one in which something belongs to another user, so that this run couldn't write it.
    """
    check_text("--workdir", str(workdir))
    kinds = dict.fromkeys((FOLDER, "tensorboard", profiling.FOLDER), Path.is_dir)
    kinds |= dict.fromkeys(("config.json", "tokenizer.json", JSONL, "lock"), Path.is_file)
    try:
        for name, fits in kinds.items():
            path = workdir / name
            if (path.exists() or path.is_symlink()) and not fits(path):
                kind = "folder" if fits is Path.is_dir else "file"
                raise ConfigError(
                    f"{path} is not a {kind}, which a run needs: move it away, or use another "
                    "--workdir"
                )
        _check_permissions(workdir)
    except OSError as error:
        raise ConfigError(
            f"--workdir={shown(str(workdir))} can't be read ({error.strerror}): choose another "
            "folder"
        ) from None


def _check_permissions(workdir: Path) -> None:
    """Refuses a workdir with files that another user has left there, for example root."""
    read, write, enter = os.R_OK, os.W_OK, os.X_OK
    if not workdir.is_dir():
        return  # `create_workdir` makes it.
    me, status = os.geteuid(), workdir.stat()
    # In a folder such as /tmp (sticky), only their owners may replace files.
    sticky = status.st_mode & stat.S_ISVTX and me not in (0, status.st_uid)
    wanted = {workdir: read | write | enter}
    wanted |= {workdir / name: read for name in ("config.json", "tokenizer.json")}
    wanted |= {workdir / name: read | write for name in ("lock", JSONL)}
    folders = [workdir / name for name in (FOLDER, "tensorboard", profiling.FOLDER)]
    wanted |= dict.fromkeys(folders, read | write | enter)
    if os.access(workdir / FOLDER, read | enter, effective_ids=True):
        # Old ones are to be removed.
        steps = [path for path in integrity.steps(workdir / FOLDER) if path.is_dir()]
        wanted |= dict.fromkeys(steps, read | write | enter)
    for path, mode in wanted.items():
        if not path.exists():
            continue
        owner = path.stat().st_uid
        foreign = sticky and path != workdir and owner != me
        if foreign or not os.access(path, mode, effective_ids=True):
            way_out = "make it writable" if owner == me else "change its owner with chown -R"
            raise ConfigError(
                f"--workdir={workdir}: {path} belongs to user {owner}, and user {me} can't read "
                f"and write it: {way_out}, or use another folder"
            )


def create_workdir(workdir: Path) -> None:
    """Creates the workdir if it doesn't exist, and checks that it can be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} can't be written ({error.strerror}): choose another folder"
        ) from None


@contextlib.contextmanager
def locked(workdir: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Locks a workdir against other runs; when a process dies, its lock is released.

    Process 0 holds the lock for all processes of a run. `say` is called with a line of text if the
    disk has no flock.
    """
    if not processes.is_main():
        yield
        return

    def busy(lock: str) -> None:
        dead = f"; if it has died on another machine, remove {lock}" if lock else ""
        raise ConfigError(
            f"--workdir={workdir} is in use by another run: wait until it has ended, or use "
            f"another folder{dead}"
        )

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.held(workdir / "lock", busy, say))
        except OSError as error:
            raise ConfigError(
                f"--workdir={workdir} can't be locked ({error.filename}: {error.strerror}): remove "
                "that file, or use another folder"
            ) from None
        yield


def check_disk(workdir: Path, state: Any) -> None:
    """Refuses a disk without room for one more checkpoint beside the existing ones.

    What an interrupted save has left counts as room: the run removes it before it writes.

    Args:
      workdir: an existing folder.
      state: the arrays that a checkpoint holds, or their shapes and dtypes.
    """
    needed = files.num_bytes(state)
    free = shutil.disk_usage(workdir).free
    with contextlib.suppress(OSError):  # What can't be read can't be removed, either.
        left = [path for folder in leftovers(workdir / FOLDER) for path in folder.rglob("*")]
        free += sum(path.lstat().st_size for path in left)
    if free < needed:
        raise ConfigError(
            f"--workdir={workdir} has {in_bytes(free)} free and a checkpoint takes "
            f"{in_bytes(needed)}: make room, or use another folder"
        )
