"""A contestant's side of a comparison in turns; it runs in a peer's Python, too."""

import sys
import time
from collections.abc import Callable


def serve(steps: Callable[[int], None]) -> None:
    """Says "ready"; then does N steps for each line N of stdin, and prints the seconds."""
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        steps(int(line))
        print(time.perf_counter() - began, flush=True)
