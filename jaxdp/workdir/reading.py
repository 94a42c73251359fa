"""Reads from a checkpoint's files, and tells what a failure to read means.

Only what is not as it was written is damage. A disk that doesn't answer and memory that is full say
nothing about the files: they end the run, which changes nothing, and the next start reads again.
"""

import asyncio
import contextlib
import errno
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

from jaxdp.common.errors import RunError
from jaxdp.common.files import causes, error_number, first_line, reason

T = TypeVar("T")

PAUSES = (1.0, 4.0)  # Seconds before the second and the third try.
# A file isn't there, or something else is in its place: trying again can't help.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def patiently(read: Callable[[], T], what: str, report: Callable[[str], None]) -> T:
    """Returns read(); tries again after an I/O error.

    Args:
      read: reads files.
      what: what it reads, such as "checkpoint 5".
      report: called with a line of text before each further try.

    Raises:
      RunError: the disk doesn't answer, or there is too little memory.
      Exception: any other, as `read` raises it: the content is damaged, or a device fails.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except Exception as error:  # Orbax and TensorStore raise whatever they like.
            if out_of_memory(error):
                raise RunError(
                    f"too little memory to read {what} ({first_line(error)}): to go on takes no "
                    "more than training does, so see what else fills the memory of this machine "
                    "or its devices, and run again; nothing was changed"
                ) from error
            if not is_io_error(error):
                raise
            if pause is None:
                raise RunError(
                    f"{what} can't be read ({reason(error)}): see to the disk or its permissions, "
                    "and run again; nothing was changed"
                ) from error
            report(f"{what} can't be read ({reason(error)}): trying again in {pause:g} s.")
            time.sleep(pause)
    raise AssertionError("unreachable")


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that a device or the host has no memory left."""
    full = re.compile("RESOURCE_EXHAUSTED|[Oo]ut of memory")
    return error_number(error) == errno.ENOMEM or any(
        isinstance(cause, MemoryError) or full.search(str(cause)[:1000]) for cause in causes(error)
    )


def is_io_error(error: BaseException) -> bool:
    """Returns whether an error is the disk's or the network's; a missing file is not."""
    number = error_number(error)
    return number is not None and number not in MISSING


def is_damage(error: BaseException) -> bool:
    """Returns whether an error while reading shows that the content isn't what was written."""
    ours = (RunError, jax.errors.JaxRuntimeError)
    return not any(isinstance(cause, ours) for cause in causes(error))


@contextlib.contextmanager
def ending_reads() -> Iterator[None]:
    """Makes Orbax finish all reads of a checkpoint when one of them fails.

    Otherwise it closes the event loop that the others use, and each prints a traceback later.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


class _PatientPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


class _PatientLoop(asyncio.SelectorEventLoop):
    def close(self) -> None:
        tasks = () if self.is_closed() else asyncio.all_tasks(self)
        if tasks:
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()
