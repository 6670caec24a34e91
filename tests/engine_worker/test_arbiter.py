"""What a worker lets several routers do: its rules in a table, and what holds after any steps."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_worker.arbiter import CLAIM_S, Arbiter, RefusedError
from engine_worker.protocol import AdapterId, Refusal

A, B, C, D = (AdapterId(f"base:{name}", "1") for name in "abcd")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def arbiter(slots: int = 2, limit: int = 0, *held: AdapterId, now: Clock | None = None) -> Arbiter:
    made = Arbiter(slots, limit, now or Clock())
    for adapter in held:
        load(made, "before", adapter)
    return made


def load(made: Arbiter, router: str, adapter: AdapterId, *evict: AdapterId) -> None:
    leaves = made.begin_load(router, adapter, evict)
    made.end_load(adapter, "/folder", leaves, loaded=True)


def refusal(step: object) -> Refusal:
    assert callable(step)
    with pytest.raises(RefusedError) as error:
        step()
    return error.value.refusal


def test_the_limit_is_over_all_routers() -> None:
    made = arbiter(2, 3, A)
    for router, adapter in (("one", A), ("other", A), ("one", None)):
        made.enter(router, adapter)
    assert refusal(lambda: made.enter("third", None)) is Refusal.FULL
    assert (made.others("one"), made.others("other"), made.others("third")) == (1, 2, 3)
    made.leave("other", A)
    made.enter("third", None)
    counted = made.occupancy()
    assert (counted.ongoing, counted.ongoing_peak, counted.refused["full"]) == (3, 3, 1)


@pytest.mark.parametrize(
    ("evict", "users", "left"),
    [
        ((A,), {}, {B, C}),  # idle: as asked
        ((A,), {"one": A}, {B, C}),  # its own: its own affair
        ((A, B), {"other": A}, {A, C}),  # another's stays, and there is room without it
        ((A,), {"other": A}, None),
        ((), {}, None),
        ((D,), {}, None),  # not held: no room by that
    ],
)
def test_who_leaves_for_a_newcomer(
    evict: tuple[AdapterId, ...], users: dict[str, AdapterId], left: set[AdapterId] | None
) -> None:
    made = arbiter(2, 0, A, B)
    for router, adapter in users.items():
        made.enter(router, adapter)
    if left is None:
        assert refusal(lambda: load(made, "one", C, *evict)) is Refusal.NO_SLOT
        left = {A, B}
    else:
        load(made, "one", C, *evict)
    assert set(made.held) == left
    assert not made.coming
    assert not made.leaving


def test_what_leaves_takes_no_new_requests_and_stays_where_the_load_fails() -> None:
    made = arbiter(1, 0, A)
    leaves = made.begin_load("one", B, (A,))
    assert refusal(lambda: made.enter("other", A)) is Refusal.ADAPTER_GONE
    assert refusal(lambda: made.begin_load("other", C, (A,))) is Refusal.NO_SLOT
    assert refusal(lambda: made.begin_load("other", A, ())) is Refusal.NO_SLOT
    assert made.used_by_others("other") == (B,)
    made.enter("other", B)  # it may wait for it
    made.end_load(B, "/folder", leaves, loaded=False)
    made.enter("other", A)
    assert made.held == (A,)


def test_what_was_loaded_for_a_request_on_its_way_is_not_evicted() -> None:
    clock = Clock()
    made = arbiter(1, 0, A, now=clock)
    made.claim("one", A)
    assert made.used_by_others("other") == (A,)
    assert made.used_by_others("one") == ()
    assert refusal(lambda: load(made, "other", B, A)) is Refusal.NO_SLOT
    made.enter("one", A)
    made.leave("one", A)
    load(made, "other", B, A)
    made.claim("other", B)
    clock.now += CLAIM_S
    load(made, "one", C, B)


def test_who_is_patient_has_what_others_use_closed() -> None:
    made = arbiter(1, 0, A)
    made.enter("other", A)
    leaves = made.begin_load("one", B, (A,), drain=True)
    assert leaves == (A,)
    assert made.used(leaves)
    assert refusal(lambda: made.enter("other", A)) is Refusal.ADAPTER_GONE
    made.leave("other", A)
    assert not made.used(leaves)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "enter",
                "leave",
                "begin",
                "end",
                "fail",
                "claim",
                "later",
                "unload",
                "unloaded",
                "stays",
            ]
        ),
        st.sampled_from(["one", "other", "third"]),
        st.sampled_from([A, B, C, D]),
        st.sampled_from([(), (A,), (B,), (C, D)]),
        st.booleans(),
    ),
    max_size=60,
)


def check(
    made: Arbiter,
    slots: int,
    limit: int,
    running: list[tuple[str, AdapterId]],
    unloading: list[AdapterId],
    *,
    loads: bool,
) -> None:
    leaving = [one for one in made.leaving if one not in unloading]
    assert len(made.held) + len(made.coming) - len(leaving) <= slots
    assert not any(made.holds(one) for one in unloading)
    assert not limit or len(running) <= limit
    assert made.occupancy().ongoing == len(running)
    users = Counter(router for router, _ in running)
    for one in ("one", "other", "third"):
        assert made.others(one) == len(running) - users[one]
    for _, used in running:
        assert used in made.held or used in made.coming or loads or used not in leaving


@given(STEPS, st.integers(1, 3), st.integers(0, 4))
def test_no_order_of_steps_breaks_a_bound(
    steps: list[tuple[str, str, AdapterId, tuple[AdapterId, ...], bool]], slots: int, limit: int
) -> None:
    clock = Clock()
    made = Arbiter(slots, limit, clock)
    running: list[tuple[str, AdapterId]] = []
    loading: list[tuple[AdapterId, tuple[AdapterId, ...]]] = []
    unloading: list[AdapterId] = []
    for what, router, adapter, evict, drain in steps:
        try:
            if what == "enter":
                made.enter(router, adapter)
                running.append((router, adapter))
            elif what == "leave" and running:
                made.leave(*running.pop(0))
            elif what == "begin" and adapter not in {one for one, _ in loading}:
                if not made.has_loaded(adapter, "/folder"):
                    loading.append((adapter, made.begin_load(router, adapter, evict, drain=drain)))
            elif what in {"end", "fail"} and loading:
                come, leaves = loading.pop(0)
                done = what == "end" and not made.used(leaves)
                made.end_load(come, "/folder", leaves, loaded=done)
            elif what == "claim" and made.holds(adapter):
                made.claim(router, adapter)
            elif what == "unload" and made.holds(adapter):
                used_by_others = {one for other, one in running if other != router}
                made.begin_unload(router, adapter)
                assert adapter not in used_by_others
                unloading.append(adapter)
            elif what in {"unloaded", "stays"} and unloading:
                gone = unloading.pop(0)
                used = any(one == gone for _, one in running)  # by its own router, which knows
                made.end_unload(gone, unloaded=what == "unloaded" and not used)
            elif what == "later":
                clock.now += CLAIM_S / 2
        except RefusedError:
            pass
        check(made, slots, limit, running, unloading, loads=bool(loading))
