"""What operators ask for is done in every process, and as it was meant."""

import asyncio
import time
from pathlib import Path

import pytest
from lived import MODEL, Lived, lived, put

from router.core.job import AdapterRef
from router.lifecycle.alias import Alias, rolled_back
from router.lifecycle.words import LifecycleError


async def two_versions(one: Lived, folder: Path) -> tuple[AdapterRef, AdapterRef]:
    """The one that serves, and one that is a candidate without a share."""
    put(folder, "a", 1)
    await one.adapters.refresh()
    serving = await one.asked("a")
    put(folder, "a", 2)
    await one.adapters.refresh()
    candidate = one.adapters.names.alias("a").candidate
    return serving, AdapterRef(MODEL, "a", candidate)


async def test_a_candidate_that_another_process_serves_already_is_not_retired(
    tmp_path: Path,
) -> None:
    async with lived(tmp_path, rollout_weight=0.5) as one, lived(tmp_path) as other:
        put(tmp_path, "a", 1)
        await one.adapters.refresh()
        await one.asked("a")
        put(tmp_path, "a", 2)
        candidate = await other.asked("a")  # the first time there, so what the store has
        await one.adapters.refresh()
        assert one.adapters.names.alias("a").candidate == candidate.version
        assert candidate not in other.router.fleet.retired
        slot = other.worker.slots.get(candidate)
        assert slot is not None
        assert not slot.departs


@pytest.mark.parametrize("operation", ["promote", "rollback"])
async def test_what_has_changed_before_it_was_done_is_not_done(
    tmp_path: Path, operation: str
) -> None:
    """A candidate that was dropped is not promoted, nor does dropping it drop what serves."""
    async with lived(tmp_path, rollout_weight=0.0) as one:
        serving, candidate = await two_versions(one, tmp_path)
        change = one.spread.change

        async def dropped_before(name: str, step: object) -> Alias:
            one.spread.change = change  # type: ignore[method-assign]
            await change(name, lambda alias: rolled_back(alias, "it fails", time.time()))
            return await change(name, step)  # type: ignore[arg-type]

        one.spread.change = dropped_before  # type: ignore[method-assign]
        with pytest.raises(LifecycleError, match="ask again") as refused:
            await getattr(one.operations, operation)("a")
        assert refused.value.kind == "conflict"
        assert one.serving("a") == serving.version
        assert one.adapters.names.alias("a").refused == candidate.version


async def test_who_has_just_begun_holds_up_no_call(tmp_path: Path) -> None:
    put(tmp_path, "a", 1)
    async with lived(tmp_path) as one:
        await one.adapters.refresh()
        await one.operations.pin("a", pinned=True)
        async with lived(tmp_path):
            async with asyncio.timeout(1.5):  # less than who does not answer is waited for
                await one.operations.pin("a", pinned=True)
