"""benchmarks/gpu.py, whose processes run on a CPU here."""

import os
import subprocess
import sys

from support.texts import REPOSITORY

# Makes these packages look as if they weren't installed; Python runs the file when it starts.
WITHOUT_TENSORFLOW = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "tensorboardX"):
    sys.modules[name] = None
"""
# One part for each function that yields one; "gpu.py" without --parts runs some of them twice.
PARTS = {
    "checks": "Gradients",
    "124M-32": "GPT-2 124M, 32",
    "kernels": "Kernels",
    "variants": "Other settings",
    "resume": "Stopped and resumed",
}


def test_the_gpu_benchmark_in_a_rehearsal(tmp_path):
    """Each part yields a table with figures, whatever they are; a part without time is named."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TENSORFLOW)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    arguments = ["--rehearse", "--minutes=60", f"--parts={','.join(PARTS)}"]
    process = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments, f"--output={tmp_path}/gpu.md"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    log = (tmp_path / "gpu.log").read_text()
    assert process.returncode == 0, process.stderr + log
    out = (tmp_path / "gpu.md").read_text()
    assert out == process.stdout and "A rehearsal on a CPU" in out
    for wrong in ("Died", "Ended", "out of memory", "failed"):
        assert wrong not in out, out + log
    for title in PARTS.values():
        [part] = [p for p in out.split("\n## ") if p.startswith(title)]
        rows = [x for x in part.splitlines() if x.startswith("| ") and x.count("|") > 2]
        assert len(rows) >= 2 and any(c.isdigit() for c in "".join(rows)), part
    assert "the same bits | the same bits | the same bits" in out
    assert len((tmp_path / "gpu_kernels.tsv").read_text().splitlines()) > 10


def test_a_part_that_does_not_fit_into_the_time_is_named(tmp_path):
    arguments = ["--rehearse", "--minutes=0.1", "--parts=checks", f"--output={tmp_path}/gpu.md"]
    process = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    assert "Skipped: 6 s are left" in process.stdout
