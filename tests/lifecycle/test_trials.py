"""A new version that fails more often than what is served beside it is gone back from, by itself."""

import asyncio
from pathlib import Path

from lived import Lived, lived, put

from router.core.job import AdapterRef, AdapterUse


def ended(one: Lived, adapter: AdapterRef, *, failed: int, well: int) -> None:
    for outcome in [True] * failed + [False] * well:
        one.adapters.ended(adapter, AdapterUse.HIT, failed=outcome)


async def until_serves(one: Lived, adapter: AdapterRef) -> None:
    async with asyncio.timeout(10):
        while one.adapters.names.alias("a").refused == "":
            await asyncio.sleep(0.005)
    assert one.adapters.names.alias("a").versions == (adapter.version,)


async def test_a_version_that_serves_all_and_a_candidate(tmp_path: Path) -> None:
    for weight in (1.0, 0.5):
        folder = tmp_path / str(weight)
        folder.mkdir()
        put(folder, "a", 1)
        put(folder, "b", 9)
        async with lived(folder, rollout_weight=weight) as one, lived(folder) as other:
            await one.adapters.refresh()
            old, beside = await one.asked("a"), await one.asked("b")
            ended(one, beside, failed=0, well=50)
            put(folder, "a", 2)
            await one.adapters.refresh()
            new = one.adapters.names.ref("a", one.adapters.names.alias("a").versions[-1])
            assert new != old
            ended(one, beside, failed=1, well=50)
            ended(one, new, failed=2, well=10)
            assert new.version in one.adapters.names.alias("a").versions
            ended(one, new, failed=20, well=0)
            await until_serves(one, old)
            await until_serves(other, old)
            await one.adapters.refresh()
            assert one.serving("a") == old.version, "nor is it followed again"


async def test_what_is_over_is_not_counted_for_what_is_gone(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    async with lived(tmp_path) as one:
        await one.adapters.refresh()
        adapter = await one.asked("a")
        ended(one, adapter, failed=0, well=1)
        (tmp_path / "store" / "a" / "adapter_config.json").unlink()
        await one.adapters.refresh()
        ended(one, adapter, failed=0, well=1)
        assert one.adapters.usages.by_name == {}
        assert one.adapters.usages.changed == {}
