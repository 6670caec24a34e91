"""What the store has by now is served, whenever it has changed, and what is no good never is."""

import asyncio
from pathlib import Path

from lived import lived, put


async def test_a_version_that_comes_while_another_one_is_followed(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    async with lived(tmp_path) as one:
        await one.adapters.refresh()
        await one.asked("a")
        put(tmp_path, "a", 2)
        held = asyncio.Event()
        load = one.loader.load

        async def slow(*what: object) -> int:
            await held.wait()
            return await load(*what)  # type: ignore[arg-type]

        one.loader.load = slow  # type: ignore[method-assign,assignment]
        following = asyncio.ensure_future(one.adapters.refresh())
        while len(one.worker.slots) < 2:
            await asyncio.sleep(0.005)
        put(tmp_path, "a", 3)
        again = asyncio.ensure_future(one.adapters.refresh())
        while (listed := one.adapters.catalog.get("a")) is None or listed.version:
            await asyncio.sleep(0.005)
        held.set()
        await asyncio.gather(following, again)
        stored = await one.adapters.catalog.find("a", afresh=True)
        assert stored is not None
        assert one.serving("a") == stored.version


async def test_a_version_that_came_while_no_router_ran(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    async with lived(tmp_path) as one:
        await one.adapters.refresh()
        first = await one.asked("a")
        put(tmp_path, "a", 2)
        await one.adapters.refresh()
        second = one.serving("a")
        assert second != first.version
    put(tmp_path, "a", 3)
    async with lived(tmp_path) as one:
        assert one.serving("a") == second, "until the store was looked at"
        await one.adapters.refresh()
        assert one.serving("a") not in {first.version, second}


async def test_what_an_operator_chose_is_not_undone_by_a_restart(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    async with lived(tmp_path) as one:
        await one.adapters.refresh()
        first = await one.asked("a")
        put(tmp_path, "a", 2)
        await one.adapters.refresh()
        await one.operations.promote("a", first.version)
    async with lived(tmp_path) as one:
        await one.adapters.refresh()
        assert one.serving("a") == first.version


async def test_who_starts_later_is_not_given_what_was_refused(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    async with lived(tmp_path) as one:
        await one.adapters.refresh()
        first = await one.asked("a")
        put(tmp_path, "a", 2, r=64)
        await one.adapters.refresh()
        assert one.serving("a") == first.version
    async with lived(tmp_path) as one:
        await one.adapters.refresh()
        assert await one.asked("a") == first


async def test_what_one_listing_lacks_keeps_what_was_decided_of_it(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    put(tmp_path, "b", 2)
    place, away = tmp_path / "store" / "a", tmp_path / "away"
    async with lived(tmp_path) as one:
        await one.adapters.refresh()
        await one.asked("a")
        await one.operations.pin("a", pinned=True)
        place.rename(away)
        await one.adapters.refresh()
        assert await one.adapters.find("a") is None
        away.rename(place)
        await one.adapters.refresh()
        assert one.adapters.names.alias("a").pinned
        await one.asked("a")
        place.rename(away)
        await one.adapters.refresh()
        await one.adapters.refresh()
        await asyncio.sleep(0)
        while one.adapters.names.alias("a").pinned:
            await asyncio.sleep(0.005)
