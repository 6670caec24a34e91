"""The queue's order: fair by tokens, priorities, and what locality may cost."""

import asyncio

import pytest
from fleets import W, fleet_of
from harness import ref, settle, simulate
from hypothesis import given
from hypothesis import strategies as st

from router.core.admission import PRIORITY_BASE, AdmissionQueue, Waiter
from router.core.fleet import Worker
from router.core.job import Job


class Line:
    """A queue of strings: join by name, and see who is served in which order."""

    def __init__(
        self, limit: int = 1000, locality: float = 0.0, weights: dict[str, float] | None = None
    ) -> None:
        self.queue: AdmissionQueue[None] = AdmissionQueue(
            limit=limit, locality_tokens=locality, weights=weights
        )

    def join(
        self, name: str, tokens: float = 100, adapter: str | None = None, **fields: object
    ) -> Waiter[None]:
        job = Job(name, ref(adapter) if adapter else None, **fields)  # type: ignore[arg-type]
        waiter: Waiter[None] = Waiter(job, asyncio.get_running_loop().create_future(), 0.0)
        self.queue.join(waiter, self.queue.tag_of(job, tokens))
        return waiter

    def serve(self, worker: Worker, count: int = 1000) -> list[str]:
        served: list[str] = []
        while len(served) < count and (waiter := self.queue.next_for(worker, {})):
            self.queue.serve(waiter, None)
            served.append(waiter.job.id)
        return served


def test_alone_a_tenant_is_first_come_first_served() -> None:
    async def main() -> None:
        line = Line()
        for number, tokens in enumerate((500, 1, 90, 1)):
            line.join(str(number), tokens)
        assert line.serve(Worker("w", max_ongoing=9, slots=1)) == ["0", "1", "2", "3"]
        await settle()

    simulate(main())


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, "abababaa"),
        ({"b": 3.0}, "bbaabaaa"),
    ],
)
def test_who_asks_for_less_than_its_share_is_not_held_up_by_a_flood(
    weights: dict[str, float], expected: str
) -> None:
    async def main() -> None:
        line = Line(weights=weights)
        for _ in range(5):
            line.join("a", tenant="a")
        for _ in range(3):
            line.join("b", tenant="b")
        served = line.serve(Worker("w", max_ongoing=9, slots=1))
        assert sorted(served) == sorted(expected)
        # Equal shares: one each in turn; thrice the share: done before a's second is.
        last_of_b = len(served) - 1 - served[::-1].index("b")
        assert last_of_b == 5 if not weights else last_of_b <= 3

    simulate(main())


def test_a_class_is_worth_sixteen_times_the_next_and_no_more() -> None:
    async def main() -> None:
        line = Line()
        for _ in range(40):
            line.join("urgent", priority=-1)
        line.join("usual", tokens=100)
        served = line.serve(Worker("w", max_ongoing=99, slots=1))
        assert served.index("usual") == pytest.approx(PRIORITY_BASE, abs=1)

    simulate(main())


@pytest.mark.parametrize(
    ("locality", "expected"),
    [
        (0, ["cold", "hot0", "hot1", "hot2", "hot3"]),
        (200, ["hot0", "hot1", "cold", "hot2", "hot3"]),
        (1000, ["hot0", "hot1", "hot2", "hot3", "cold"]),
    ],
)
def test_locality_costs_nobody_more_than_its_bound(locality: float, expected: list[str]) -> None:
    async def main() -> None:
        line = Line(locality=locality)
        line.join("cold", adapter="b")
        for number in range(4):
            line.join(f"hot{number}", adapter="a")
        [worker] = fleet_of(W(holds=("a",)))
        assert line.serve(worker) == expected

    simulate(main())


def test_without_a_slot_only_what_is_at_hand_is_served() -> None:
    async def main() -> None:
        line = Line()
        for name in ("cold", "hot", "base"):
            line.join(name, adapter={"cold": "b", "hot": "a", "base": None}[name])
        [worker] = fleet_of(W(1, holds=("a",), used=("a",), slots=1))
        assert line.serve(worker) == ["hot", "base"]

    simulate(main())


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(1, 1000),
            st.sampled_from([None, "x", "y"]),
            st.integers(-2, 2),
            st.booleans(),
        ),
        max_size=60,
    ),
    st.floats(0, 5000),
)
def test_nobody_is_overtaken_by_more_than_the_bound(
    jobs: list[tuple[str, int, str | None, int, bool]], locality: float
) -> None:
    """Of whoever is served, nobody that waits is further ahead than the bound; nobody is lost."""

    async def main() -> None:
        line = Line(locality=locality)
        [worker] = fleet_of(W(holds=("x",), slots=2))
        served = left = 0
        waiting: dict[int, Waiter[None]] = {}
        for joined, (tenant, tokens, adapter, priority, serve) in enumerate(jobs, 1):
            waiter = line.join(str(joined), tokens, adapter, tenant=tenant, priority=priority)
            waiting[waiter.seq] = waiter
            if serve:
                if (next_one := line.queue.next_for(worker, {})) is not None:
                    first = min(waiting.values(), key=lambda one: (one.tag, one.seq))
                    assert next_one.tag <= first.tag + locality * first.unit
                    line.queue.serve(next_one, None)
                    del waiting[next_one.seq]
                    served += 1
            elif tokens % 7 == 0:
                line.queue.leave(waiter)
                line.queue.leave(waiter)  # harmless
                del waiting[waiter.seq]
                left += 1
            assert len(line.queue) == len(waiting) == joined - served - left
            by_adapter = [line.queue.waiting_for(ref(name)) for name in "xy"]
            assert sum(by_adapter) + line.queue.waiting_for(None) == len(waiting)
        rest = line.serve(worker)
        assert len(rest) == len(waiting)
        assert len(line.queue) == 0

    simulate(main())
