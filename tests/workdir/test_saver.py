import asyncio
import gc
import runpy
import sys
import warnings

import pytest

from jaxdp.workdir import saver

FAILS = """
async def fails(path):
    path.write_text("")
"""


@pytest.mark.parametrize(
    "file, told", [("orbax/checkpoint/theirs.py", False), ("jaxdp/ours.py", True)]
)
@pytest.mark.parametrize("start", [asyncio.ensure_future, lambda x: asyncio.gather(x)])
def test_only_orbax_fails_in_silence_where_nobody_awaits(tmp_path, caplog, file, told, start):
    saver.quieten()
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(FAILS)
    fails = runpy.run_path(str(tmp_path / file))["fails"]

    async def forget():
        task = start(fails(tmp_path / "missing" / "file"))
        while not task.done():
            await asyncio.sleep(0.01)

    asyncio.run(forget())
    gc.collect()
    assert ("FileNotFoundError" in caplog.text) == told


def test_coroutines_that_a_failed_save_leaves_are_not_told(monkeypatch):
    """Python would say so wherever it finds one, with a line of whatever runs there."""

    async def left():
        pass

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # Restored afterwards.
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        left()
        gc.collect()
        assert len(told) == 1
        saver.quieten.__wrapped__()
        left()
        gc.collect()
    assert len(told) == 1
