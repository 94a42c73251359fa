"""Runs contestants in turns, each in a process that may use a Python of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

OUT_OF_MEMORY = 3  # Exit status.


class OutOfMemory(Exception):
    """A contestant's device has too little memory."""


class Contestant:
    """A process that trains when it is its turn.

    Attributes:
      peak: peak memory of the device in bytes; 0 where it isn't known.
    """

    def __init__(self, *arguments: str, **environ: str):
        """Starts the process, and waits until it is warm.

        Raises:
          OutOfMemory: the process ended because its device has too little memory.
        """
        self._arguments = arguments
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environ,
        )
        while self._line() != "ready":
            pass

    def __call__(self, steps: int) -> float:
        """Runs one turn of `steps` steps; returns seconds per step."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        seconds, self.peak = map(float, self._line().split())
        return seconds / steps

    def _line(self) -> str:
        line = self._process.stdout.readline()
        if line:
            return line.strip()
        if self._process.wait() == OUT_OF_MEMORY:
            raise OutOfMemory
        raise SystemExit(f"{self._arguments[:3]} has ended with {self._process.returncode}")

    def end(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def a_step_behind(step: Callable[[], Any], read: Callable[[Any], Any]) -> Callable[[int], None]:
    """Returns a function that does `count` steps, and reads each result one step later."""

    def steps(count: int) -> None:
        before = None
        for _ in range(count):
            given = step()
            read(before)
            before = given
        read(before)

    return steps


def serve(steps: Callable[[int], None], peak: Callable[[], int] = int) -> None:
    """Warms up and prints "ready"; then does N steps for each line N of stdin.

    After each it prints the seconds that they took and peak(), the device's peak memory in bytes.
    """
    steps(3)
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        steps(int(line))
        print(time.perf_counter() - began, peak(), flush=True)


def run(main: Callable[[], None]) -> None:
    """Runs a contestant's main(); exits with OUT_OF_MEMORY if the device has too little."""
    try:
        main()
    except Exception as error:
        if not any(x in str(error) for x in ("RESOURCE_EXHAUSTED", "out of memory")):
            raise
        print(f"out of memory: {str(error)[:200]}", file=sys.stderr)
        sys.exit(OUT_OF_MEMORY)
