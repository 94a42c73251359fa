"""benchmarks/gpu.py, whose processes run on a CPU here."""

import subprocess
import sys

from support.texts import REPOSITORY


def test_the_gpu_benchmark_in_a_rehearsal():
    """All parts, tiny: their figures are there, whatever they are; attention is right."""
    process = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--rehearse", "--steps=1", "--turns=1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    out = process.stdout
    assert "A rehearsal on a CPU" in out and "out of memory" not in out
    for title in (
        "Attention",
        "Losses",
        "GPT-2 124M, context",
        "other settings",
        "longest",
        "largest",
    ):
        [part] = [p for p in out.split("\n## ") if title in p.partition("\n")[0]]
        rows = [x for x in part.splitlines() if x.startswith("| ") and x.count("|") > 2]
        assert len(rows) >= 2 and any(c.isdigit() for c in rows[-1]), part
