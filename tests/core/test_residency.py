import itertools

import pytest
from harness import ref

from router.core.job import LoadError, LoadFault
from router.core.residency import NEXT, Phase, Slot, SlotCache


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, Phase)))
def test_the_lifecycle_is_its_table(before: Phase, after: Phase) -> None:
    slot = Slot(ref("a"))
    slot.phase = before
    if after in NEXT[before]:
        slot.move(after)
        assert slot.phase is after
    else:
        with pytest.raises(AssertionError):
            slot.move(after)


def loaded(cache: SlotCache, *names: str) -> None:
    for name in names:
        cache.finish_load(cache.begin_load(ref(name)))


def test_a_victim_is_promised_but_not_counted_twice() -> None:
    cache = SlotCache(2)
    loaded(cache, "a", "b")
    slot = cache.begin_load(ref("c"))
    assert slot.victim is not None
    assert slot.victim.adapter == ref("a")
    assert slot.victim.phase is Phase.EVICTING
    assert cache.occupied == 2
    assert not cache.can_serve(ref("a"))
    assert cache.can_serve(ref("b"))
    assert cache.can_serve(ref("c"))
    victim = cache.finish_load(slot)
    assert victim is not None
    assert victim.phase is Phase.COLD
    assert [entry.adapter.name for entry in cache] == ["b", "c"]


def test_a_failed_load_leaves_the_order_of_eviction_as_it_was() -> None:
    cache = SlotCache(3)
    loaded(cache, "a", "b", "c")
    cache.fail_load(cache.begin_load(ref("d")), LoadError(LoadFault.WORKER, "no"))
    victims = []
    for name in ("x", "y", "z"):
        slot = cache.begin_load(ref(name))
        assert slot.victim is not None
        victims.append(slot.victim.adapter.name)
    assert victims == ["a", "b", "c"]
    assert not cache.can_serve(ref("w")), "every slot is promised"


def test_two_failed_loads_keep_the_order_too() -> None:
    cache = SlotCache(3)
    loaded(cache, "a", "b", "c")
    first, second = cache.begin_load(ref("x")), cache.begin_load(ref("y"))
    for slot in (first, second):
        cache.fail_load(slot, LoadError(LoadFault.WORKER, "no"))
    slot = cache.begin_load(ref("z"))
    assert slot.victim is not None
    assert slot.victim.adapter == ref("a")


def test_what_a_worker_says_it_holds_fills_free_slots_only() -> None:
    cache = SlotCache(1)
    assert cache.adopt(ref("a")) is not None
    assert cache.adopt(ref("a")) is None
    assert cache.adopt(ref("b")) is None
    slot = cache.get(ref("a"))
    assert slot is not None
    cache.acquire(slot)
    assert not cache.forget(slot)
    assert cache.release(slot)
    assert cache.forget(slot)
    assert len(cache) == 0


def test_no_slots_serve_no_adapter() -> None:
    assert not SlotCache(0).can_serve(ref("a"))
