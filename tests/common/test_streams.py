"""stdout and stderr that are closed, broken, full, or don't know a character."""

import os
import subprocess
import sys

import pytest

from jaxdp.common import streams
from support.texts import REPOSITORY

SPEAKING = """
import sys
from jaxdp.common import streams
streams.protect()
streams.protect()  # A second call changes nothing.
print("first, ä € \\udcff")
print("error", file=sys.stderr)
for _ in range(10_000): print("more than a pipe holds")
sys.stdout.flush()
sys.exit(7)
"""


def start(shell: str, **environ: str) -> tuple[int, bytes]:
    """Runs SPEAKING as $PYTHON in a shell command; returns the command's status and output."""
    done = subprocess.run(
        ["bash", "-c", shell],
        env=os.environ
        | {"PYTHONPATH": str(REPOSITORY), "SPEAKING": SPEAKING, "PYTHON": sys.executable}
        | environ,
        capture_output=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        ("2>&1 | head -1", "first"),
        (">&- 2>&- <&-", ""),
        (">&-", "error"),
        ("2>&- | head -1", "first"),
        (">/dev/full 2>/dev/full", ""),
    ],
)
@pytest.mark.parametrize("flags", ["", "-u"])
def test_no_stream_ends_a_program(where, shown, flags):
    status, said = start(f'set -o pipefail; "$PYTHON" {flags} -c "$SPEAKING" {where}')
    assert status == 7, said
    assert said.decode().startswith(shown) and b"Traceback" not in said and b"Broken" not in said


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("utf-8", "first, ä € ?".encode()),
        ("latin-1", b"first, \xe4 ? ?"),
        ("ascii", b"first, ? ? ?"),
    ],
)
def test_what_a_stream_cannot_encode_is_replaced(encoding, line):
    _, said = start('"$PYTHON" -c "$SPEAKING" | head -1', PYTHONIOENCODING=encoding)
    assert said.splitlines()[0] == line


def test_a_file_gets_no_number_of_a_stream():
    """Else what C++ prints to stderr would be written into it."""
    script = SPEAKING.replace("sys.exit(7)", "sys.exit(open('/dev/null').fileno())")
    status, _ = start('"$PYTHON" -c "$SPEAKING" >&- 2>&- <&-', SPEAKING=script)
    assert status >= 3


def test_a_pipe_that_does_not_block_loses_nothing():
    read, write = os.pipe()
    os.set_blocking(write, False)
    with subprocess.Popen(
        [sys.executable, "-c", SPEAKING], stdout=write, stderr=write, cwd=REPOSITORY
    ) as process:
        os.close(write)
        with open(read) as pipe:
            assert sum("more" in line for line in pipe) == 10_000
        assert process.wait(60) == 7


def test_streams_that_others_have_replaced_stay(monkeypatch):
    before = sys.stdout, sys.stderr
    streams.protect()
    assert (sys.stdout, sys.stderr) == before


def test_only_lines_with_the_texts_are_hidden(capfd):
    with streams.hidden(["a greeting", "another"]):
        os.write(2, b"I0000 a greeting from C++\nE0000 an error\nhalf a ")
        os.write(2, b"line\nthe end")
    os.write(2, b", then a greeting\n")
    assert capfd.readouterr().err == "E0000 an error\nhalf a line\nthe end, then a greeting\n"


DYING = """
import os
from jaxdp.common.streams import hidden
with hidden(["a greeting"]):
    os.write(2, b"F0000 Check failed")
    os.abort()
"""


def test_the_last_words_of_a_process_that_dies_are_shown():
    """XLA may abort the process while TensorFlow is imported."""
    status, said = start('"$PYTHON" -c "$SPEAKING" || exit $?', SPEAKING=DYING)
    assert status == 128 + 6 and b"F0000 Check failed" in said


def test_without_stderr_nothing_is_hidden():
    script = "from jaxdp.common.streams import hidden\nwith hidden(['x']): exit(7)"
    assert start('"$PYTHON" -c "$SPEAKING" 2>&-', SPEAKING=script)[0] == 7
