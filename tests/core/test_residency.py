import itertools

import pytest
from harness import ref

from router.core.job import LoadError, LoadFault
from router.core.residency import NEXT, Eviction, Phase, Slot, SlotCache


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


def use(cache: SlotCache, name: str, times: int = 1) -> None:
    slot = cache.get(ref(name))
    assert slot is not None
    for _ in range(times):
        cache.acquire(slot)
        cache.release(slot)


@pytest.mark.parametrize(
    ("eviction", "leaves"), [(Eviction.LRU, ["a", "b", "c"]), (Eviction.GDSF, ["b", "c", "d"])]
)
def test_who_leaves_is_the_evictions_choice(eviction: Eviction, leaves: list[str]) -> None:
    cache = SlotCache(3, eviction)
    loaded(cache, "a", "b", "c")
    use(cache, "a", 3)
    use(cache, "b")
    use(cache, "c")
    gone = []
    for name in ("d", "e", "f"):
        slot = cache.begin_load(ref(name))
        victim = cache.finish_load(slot)
        assert victim is not None
        gone.append(victim.adapter.name)
        use(cache, name)
    assert gone == leaves


def test_gdsf_forgets_what_was_popular_long_ago() -> None:
    cache = SlotCache(2, Eviction.GDSF)
    loaded(cache, "old")
    use(cache, "old", 5)
    for number in range(20):
        name = f"new{number}"
        loaded(cache, name)
        use(cache, name)
    assert cache.get(ref("old")) is None


def test_gdsf_keeps_what_takes_long_to_load() -> None:
    cache = SlotCache(2, Eviction.GDSF)
    loaded(cache, "slow", "fast")
    for name, reload_s in (("slow", 2.0), ("fast", 0.1)):
        slot = cache.get(ref(name))
        assert slot is not None
        slot.reload_s = reload_s
        use(cache, name)
    victim = cache.victim()
    assert victim is not None
    assert victim.adapter.name == "fast"


def test_a_pinned_adapter_is_never_a_victim() -> None:
    cache = SlotCache(2)
    cache.pins = {ref("a"): None}
    loaded(cache, "a", "b")
    assert cache.idle == 1
    victim = cache.victim()
    assert victim is not None
    assert victim.adapter == ref("b")
    pinned = cache.get(ref("b"))
    assert pinned is not None
    cache.pin(pinned, pinned=True)
    assert cache.victim() is None
    assert not cache.can_serve(ref("c"))
    cache.pin(pinned, pinned=False)
    assert cache.can_serve(ref("c"))


def test_a_closed_slot_takes_nobody_new_and_goes_first() -> None:
    cache = SlotCache(2)
    loaded(cache, "a", "b")
    slot = cache.get(ref("b"))
    assert slot is not None
    cache.acquire(slot)
    cache.close(slot)
    assert not cache.can_serve(ref("b"))
    with pytest.raises(AssertionError):
        cache.acquire(slot)
    cache.release(slot)
    assert cache.victim() is slot
    assert cache.open(slot)
    assert not cache.open(slot)
    assert cache.can_serve(ref("b"))
    assert cache.victim() is not slot
