"""What is to stay is there: on disk whatever the store cannot give again, and what is in slots."""

from pathlib import Path

import pytest
from lived import MODEL, lived, put

from router.adapters import space
from router.core.fleet import Report
from router.core.job import AdapterRef
from router.lifecycle.words import LifecycleError


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


ADAPTER_BYTES = 70_000  # of one made here, about


async def test_what_was_gone_back_to_is_not_removed_to_make_room(tmp_path: Path) -> None:
    """The store has only the version that was rolled back: lost, that one would serve again."""
    put(tmp_path, "a", 1)
    for number in range(4):
        put(tmp_path, f"b{number}", 10 + number)
    async with lived(tmp_path, slots=2, max_bytes=4 * ADAPTER_BYTES, rollback_window_s=1e-3) as one:
        await one.adapters.refresh()
        first = await one.asked("a")
        put(tmp_path, "a", 2)
        await one.adapters.refresh()
        await one.operations.rollback("a")
        assert one.serving("a") == first.version
        one.adapters.presence.look()
        for number in range(4):
            await one.asked(f"b{number}")
            one.adapters.presence.look()
        assert one.worker.slots.get(first) is None
        assert await one.asked("a") == first


async def test_a_disk_that_is_full_for_a_moment_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a", 1)
    async with lived(tmp_path) as one:
        await one.adapters.refresh()
        await one.asked("a")

        def full(path: Path, *, shared: bool = False) -> int | None:
            raise OSError(28, "No space left on device", path)

        with monkeypatch.context() as patch:
            patch.setattr(space, "try_lock", full)
            one.adapters.presence.look()
            one.cache.hold("a", 16 * "0")
        one.cache.let_go("a", 16 * "0")
        one.adapters.presence.look()


async def test_a_name_that_a_worker_says_is_no_path(tmp_path: Path) -> None:
    """A worker says what somebody has loaded there by hand."""
    put(tmp_path, "a", 1)
    async with lived(tmp_path) as one:
        before = files_of(tmp_path)
        for name, version in (("a", "../../x"), ("../y", 16 * "0"), ("../../z/b", "")):
            report = Report(seq=1, gpu=(AdapterRef(MODEL, name, version),))
            one.router.observe(one.worker, report)
            one.adapters.presence.look()
        assert files_of(tmp_path) == before


async def test_no_more_is_pinned_than_leaves_a_slot(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        put(tmp_path, name, 1)
    async with lived(tmp_path, slots=3, pinned_adapters=("a",)) as one:
        await one.adapters.refresh()
        await one.operations.pin("a", pinned=True)
        await one.operations.pin("b", pinned=True)
        await one.operations.pin("b", pinned=True)
        with pytest.raises(LifecycleError, match="unpin") as refused:
            await one.operations.pin("c", pinned=True)
        assert refused.value.kind == "conflict"
        await one.operations.pin("b", pinned=False)
        await one.operations.pin("c", pinned=True)
