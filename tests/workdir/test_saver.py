import asyncio
import gc

import pytest
from orbax.checkpoint._src.path import async_path

from jaxdp.workdir import saver


async def _own(path, text):
    path.write_text(text)


@pytest.mark.parametrize("whose, told", [(async_path.write_text, False), (_own, True)])
@pytest.mark.parametrize("start", [asyncio.ensure_future, lambda x: asyncio.gather(x)])
def test_only_orbax_fails_in_silence_where_nobody_awaits(tmp_path, caplog, whose, told, start):
    saver._quieten()

    async def forget():
        task = start(whose(tmp_path / "missing" / "file", ""))
        while not task.done():
            await asyncio.sleep(0.01)

    asyncio.run(forget())
    gc.collect()
    assert ("FileNotFoundError" in caplog.text) == told
