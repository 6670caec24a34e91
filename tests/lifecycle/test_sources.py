"""Adapters with places of their own: each fails for itself, and leaves when it is told to."""

import asyncio
from pathlib import Path

import pytest
from adapter_files import write_adapter
from lived import lived, put

from router.adapters.local import LocalStore
from router.adapters.store import StoredAdapter, StoreError
from router.lifecycle.sources import Sources


class Shaky(LocalStore):
    """A store that fails when it is told to."""

    fails = False

    def find(self, name: str) -> StoredAdapter | None:
        if self.fails:
            raise StoreError(f"{self.url}: 403")
        return super().find(name)


def unavailable(store: LocalStore, _: str) -> StoredAdapter | None:
    raise StoreError(f"{store.url}: 503")


def test_a_place_that_cannot_be_read_holds_up_no_listing(tmp_path: Path) -> None:
    write_adapter(tmp_path / "store" / "a")
    write_adapter(tmp_path / "own" / "b", seed=1)
    own = Shaky(str(tmp_path / "own"))

    def sources() -> Sources:
        found = Sources(LocalStore(str(tmp_path / "store")), lambda _: own)
        found.register({"b": str(tmp_path / "own" / "b")})
        return found

    one = sources()
    before = one.list()
    assert list(before) == ["a", "b"]
    own.fails = True
    assert one.list() == before
    begun = sources().list()  # by a router that starts meanwhile
    assert list(begun) == ["a", "b"]
    assert (begun["b"].name, begun["b"].version) == ("b", "")
    own.fails = False
    (tmp_path / "own" / "b" / "adapter_config.json").unlink()
    assert list(one.list()) == ["a"]


async def test_what_is_unregistered_is_served_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any process, when the call returns, though the store does not say what the name means now."""
    put(tmp_path, "a", 1)
    write_adapter(tmp_path / "own" / "b", seed=1)
    async with lived(tmp_path) as one, lived(tmp_path) as other:
        await one.adapters.refresh()
        await other.adapters.refresh()
        await one.operations.register("b", str(tmp_path / "own" / "b"))
        for each in (one, other):
            await each.asked("b")
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "find", unavailable)
            await one.operations.unregister("b")
            for each in (one, other):
                with pytest.raises(StoreError):
                    await each.adapters.find("b")
        for each in (one, other):
            assert await each.adapters.find("b") is None
            assert await each.adapters.find("a") is not None


async def test_a_refresh_returns_when_the_process_that_sees_to_it_has(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    async with lived(tmp_path) as one, lived(tmp_path) as other:
        await one.adapters.refresh()
        await one.asked("a")
        put(tmp_path, "a", 2)
        assert await other.spread.claim("a")
        asked = asyncio.ensure_future(one.operations.refresh("a"))
        before = one.serving("a")
        await asyncio.wait((asked,), timeout=0.1)
        assert not asked.done()
        await other.spread.give_back("a")
        await asked
        assert one.serving("a") != before
