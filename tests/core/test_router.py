import asyncio
import contextlib
from typing import Any

import pytest
from harness import Cluster, FakeLoader, ref, settle, simulate

from router.core.fleet import Hold, Report, Worker
from router.core.job import AdapterRef, AdapterUse, LoadError, LoadFault, Outcome, Rejected
from router.core.placement import Reason
from router.core.quotas import Quota


def test_a_burst_for_one_cold_adapter_causes_one_load_on_one_worker() -> None:
    async def main() -> None:
        cluster = Cluster(workers=2, max_ongoing=64)
        uses: list[AdapterUse] = []

        async def one() -> str:
            async with cluster.router.lease(cluster.job("a")) as lease:
                uses.append(lease.use)
                await asyncio.sleep(0.1)
                return lease.worker.id

        workers = await asyncio.gather(*(one() for _ in range(64)))
        assert len(set(workers)) == 1
        assert cluster.loader.calls == [(workers[0], "a", None)]
        assert uses.count(AdapterUse.COLD) == 1
        assert uses.count(AdapterUse.LOADING) == 63
        cluster.assert_at_rest()

    simulate(main())


def test_a_failed_load_tells_every_waiter_frees_its_slot_and_has_evicted_nothing() -> None:
    async def main() -> None:
        broken = LoadError(LoadFault.ADAPTER_INVALID, "r is 99")
        loader = FakeLoader(fails=lambda adapter: broken if adapter.name == "bad" else None)
        cluster = Cluster(workers=1, slots=2, loader=loader)
        await cluster.use("a")
        await cluster.use("b")
        results = await asyncio.gather(
            *(cluster.use("bad") for _ in range(5)), return_exceptions=True
        )
        assert [str(result) for result in results] == ["r is 99"] * 5
        assert all(isinstance(result, LoadError) for result in results)
        assert len({id(result) for result in results}) == 5
        assert cluster.resident(0) == {"a", "b"}
        assert cluster.log.evictions == []
        assert ("w0", "bad", "a") in loader.calls
        loads = len(loader.calls)
        await cluster.use("a")
        await cluster.use("b")
        assert len(loader.calls) == loads, "what was to be evicted is still a hit"
        cluster.assert_at_rest()

    simulate(main())


def test_an_unexpected_exception_of_the_loader_frees_the_slot_too() -> None:
    async def main() -> None:
        class Buggy(FakeLoader):
            async def load(
                self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None
            ) -> int:
                raise ZeroDivisionError("oops")

        cluster = Cluster(workers=1, slots=1, loader=Buggy())
        with pytest.raises(LoadError, match="ZeroDivisionError: oops"):
            await cluster.use("a")
        assert cluster.resident(0) == set()
        cluster.assert_at_rest()

    simulate(main())


def test_the_least_recently_used_goes_and_never_one_in_use() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, slots=2)
        await cluster.use("a")
        await cluster.use("b")
        await cluster.use("a")
        await cluster.use("c")
        assert cluster.log.evictions == [("w0", "b")]
        holding = cluster.start(cluster.use("a", hold_s=100))
        await settle()
        await cluster.use("d")
        assert cluster.log.evictions == [("w0", "b"), ("w0", "c")]
        assert cluster.resident(0) == {"a", "d"}
        await holding

    simulate(main())


def test_a_job_waits_while_every_slot_is_in_use_and_others_pass_it() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, slots=1)
        loop = asyncio.get_running_loop()
        await cluster.use("a")
        holding = cluster.start(cluster.use("a", hold_s=10))
        await settle()
        cold = cluster.start(cluster.use("b"))
        await settle()
        assert cluster.router.queued == 1
        started = loop.time()
        await cluster.use("a", hold_s=1)
        assert loop.time() - started == pytest.approx(1)
        await cold
        assert holding.done()
        cluster.assert_at_rest()

    simulate(main())


def test_a_hot_adapter_cannot_starve_a_cold_one() -> None:
    """Without patience the stream for `hot` would hold the only slot for ever."""

    async def main() -> None:
        cluster = Cluster(workers=1, slots=1, slot_patience_s=5, queue_timeout_s=1000)
        await cluster.use("hot")
        served: list[str] = []

        async def stream(start_s: float) -> None:
            await asyncio.sleep(start_s)
            for _ in range(100):
                await cluster.use("hot", hold_s=1)
                served.append("hot")

        async def cold() -> None:
            await asyncio.sleep(0.25)
            await cluster.use("cold")
            served.append("cold")

        await asyncio.gather(stream(0.0), stream(0.5), cold())
        assert 5 <= served.index("cold") <= 14
        cluster.assert_at_rest()

    simulate(main())


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
def test_a_slot_closed_for_one_that_gives_up_is_opened_again(how: str) -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, slots=1, slot_patience_s=2, queue_timeout_s=1000)
        loop = asyncio.get_running_loop()
        await cluster.use("a")
        holding = cluster.start(cluster.use("a", hold_s=500))
        await settle()
        deadline = loop.time() + 20 if how == "timed out" else None
        cold = cluster.start(cluster.use("b", deadline=deadline))
        await asyncio.sleep(3)
        assert cluster.workers[0].slots.closed is not None
        behind = [cluster.start(cluster.use("a")) for _ in range(3)]
        await settle()
        assert cluster.router.queued == 4, "closed to them too"
        if how == "cancelled":
            cold.cancel()
        await asyncio.wait(behind, timeout=30)
        assert all(task.done() for task in behind)
        assert [slot for slot in cluster.workers[0].slots if slot.closed] == []
        await asyncio.gather(cold, return_exceptions=True)
        await holding
        cluster.assert_at_rest()

    simulate(main())


@pytest.mark.parametrize("policy", ["affinity", "cost"])
def test_many_that_are_cancelled_in_one_step_leave_nothing_behind(policy: str) -> None:
    """Those who wait are cancelled before the release of those who hold serves them."""

    async def main() -> None:
        cluster = Cluster(workers=1, slots=2, max_ongoing=2, policy=policy)
        tasks = [cluster.start(cluster.use(name, hold_s=100)) for name in "aabbcc"]
        await asyncio.sleep(5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)
        await asyncio.sleep(120)
        cluster.assert_at_rest()

    simulate(main())


def test_only_the_slot_that_is_given_up_is_closed() -> None:
    """The other adapters, and the other workers, are served on while one slot falls idle."""

    async def main() -> None:
        cluster = Cluster(workers=1, slots=2, slot_patience_s=2, queue_timeout_s=1000)
        long = cluster.start(cluster.use("a", hold_s=100))
        more = [cluster.start(cluster.use("b", hold_s=20)) for _ in range(2)]
        await asyncio.sleep(2)
        cold = cluster.start(cluster.use("c"))
        await asyncio.sleep(3)
        closed = cluster.workers[0].slots.closed
        assert closed is not None
        assert closed.adapter.name == "a", "of the fewest users"
        await cluster.use("b")
        long.cancel()
        await cold
        await asyncio.gather(long, *more, return_exceptions=True)
        cluster.assert_at_rest()

    simulate(main())


def test_the_adapter_is_fetched_before_a_worker_is_chosen() -> None:
    """A slow store holds no place and closes no adapter; one fetch is enough for all who wait."""

    async def main() -> None:
        cluster = Cluster(workers=1, slots=1, max_ongoing=1, loader=FakeLoader(1, fetch_s=30))
        cluster.loader.fetched[ref("a")] = None
        await cluster.use("a")
        slow = [cluster.start(cluster.use("b")) for _ in range(2)]
        await settle()
        assert cluster.workers[0].in_flight == 0
        assert cluster.resident(0) == {"a"}
        await cluster.use("a", hold_s=1)
        await asyncio.gather(*slow)
        assert [call[1] for call in cluster.loader.calls] == ["a", "b"]
        assert cluster.log.fetches == [("b", 30.0, None)]
        cluster.assert_at_rest()

    simulate(main())


def test_a_deadline_bounds_the_fetch_too() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, loader=FakeLoader(1, fetch_s=30))
        loop = asyncio.get_running_loop()
        with pytest.raises(Rejected) as caught:
            await cluster.use("b", deadline=loop.time() + 5)
        assert caught.value.outcome is Outcome.DEADLINE
        assert loop.time() == pytest.approx(5)
        await asyncio.sleep(60)
        assert cluster.router.fleet.staged(ref("b")), "it is fetched all the same"

    simulate(main())


def test_a_cold_load_is_refused_when_asked_to() -> None:
    async def main() -> None:
        cluster = Cluster(workers=2, slots=1)
        with pytest.raises(Rejected, match="would take about") as caught:
            await cluster.use("a", refuse_cold=True)
        assert caught.value.outcome is Outcome.COLD_REFUSED
        assert caught.value.retry_after_s > 0
        assert cluster.loader.calls == []
        await cluster.use("a")
        await cluster.use("a", refuse_cold=True)
        cluster.assert_at_rest()

    simulate(main())


def test_a_quota_is_reserved_settled_and_given_back() -> None:
    async def main() -> None:
        quotas = {"team": Quota(tokens_per_minute=1000)}
        cluster = Cluster(quotas=quotas)
        job: dict[str, Any] = {
            "tenant": "team",
            "prompt_tokens": 500,
            "max_output_tokens": 100,
        }
        async with cluster.router.lease(cluster.job(**job)) as lease:
            with pytest.raises(Rejected) as caught:
                await cluster.use(None, **job)
            assert caught.value.outcome is Outcome.OVER_QUOTA
            # 200 tokens are lacking, at 1,000 a minute.
            assert caught.value.retry_after_s == pytest.approx(12)
            await cluster.use(None, prompt_tokens=500, tenant="another")
            lease.answered(10, prompt_tokens=90)
        await cluster.use(None, **job)  # 900 were left
        with pytest.raises(RuntimeError, match="the worker failed"):
            async with cluster.router.lease(cluster.job(tenant="team", max_output_tokens=1)):
                raise RuntimeError("the worker failed")  # and it costs the tenant nothing
        with pytest.raises(Rejected):
            await cluster.use(None, **job)

    simulate(main())


@pytest.mark.parametrize("avoid", [(), ("w0",)])
def test_a_retry_is_no_second_request_and_reserves_its_tokens_once(avoid: tuple[str, ...]) -> None:
    """Whatever the cause: a worker that failed, or an adapter that has changed in the store."""

    async def main() -> None:
        quota = Quota(requests_per_minute=2, tokens_per_minute=1000)
        cluster = Cluster(quotas={"team": quota})
        job = cluster.job(tenant="team", prompt_tokens=300, max_output_tokens=100)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                async with cluster.router.lease(job):
                    raise RuntimeError("the worker failed")
            job.avoid = avoid
        async with cluster.router.lease(job) as lease:
            lease.answered(100)
        await cluster.use(None, tenant="team", prompt_tokens=500, max_output_tokens=100)
        with pytest.raises(Rejected, match="over its quota"):
            await cluster.use(None, tenant="team")

    simulate(main())


def test_a_full_queue_turns_away_who_comes_last_by_share() -> None:
    """Who floods fills the queue, but cannot keep out who asks for less than its share."""

    async def main() -> None:
        cluster = Cluster(workers=1, max_ongoing=1, max_queued=3)
        holding = cluster.start(cluster.use(None, hold_s=10))
        await settle()
        flood = [
            cluster.start(cluster.use(None, tenant="flood", prompt_tokens=100)) for _ in range(4)
        ]
        await settle()
        polite = cluster.start(cluster.use(None, tenant="polite", prompt_tokens=100))
        await settle()
        ended = await asyncio.gather(*flood, polite, return_exceptions=True)
        await holding
        outcomes = [one.outcome if isinstance(one, Rejected) else "served" for one in ended]
        full = Outcome.QUEUE_FULL
        assert outcomes == ["served", "served", full, full, "served"]
        cluster.assert_at_rest()

    simulate(main())


def test_what_would_miss_its_deadline_is_turned_away_early() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, max_ongoing=1, queue_timeout_s=1000)
        loop = asyncio.get_running_loop()
        first = [cluster.start(cluster.use(None, hold_s=1)) for _ in range(60)]
        await asyncio.sleep(40)
        # About twenty wait, one is served a second.
        started = loop.time()
        with pytest.raises(Rejected, match="miss its deadline") as caught:
            await cluster.use(None, deadline=started + 5)
        assert loop.time() == started, "at once"
        assert caught.value.outcome is Outcome.DEADLINE
        assert 15 <= caught.value.retry_after_s <= 25
        await cluster.use(None, deadline=started + 40)
        await asyncio.gather(*first)
        cluster.assert_at_rest()

    simulate(main())


def test_a_flood_in_the_queue_does_not_have_another_tenant_turned_away() -> None:
    """By its tag it would come last, since it was served without waiting; by its share it is next."""

    async def main() -> None:
        cluster = Cluster(workers=1, max_ongoing=2, max_queued=100)
        tasks = [
            cluster.start(cluster.use(None, hold_s=1, tenant="flood", prompt_tokens=1))
            for _ in range(80)
        ]
        await asyncio.sleep(33.5)  # two a second are served: that is known now
        before = cluster.use(None, tenant="polite", prompt_tokens=10**6, priority=3)
        tasks.append(cluster.start(before))  # its tag is far behind those of all others
        await settle()
        now = cluster.router.loop.time()
        for deadline_s, turned_away in ((3.0, False), (0.4, True)):
            deadline = now + deadline_s
            job = cluster.use(None, tenant="polite", prompt_tokens=1, priority=3, deadline=deadline)
            task = cluster.start(job)
            await settle()
            assert task.done() == turned_away
            tasks.append(task)
        assert cluster.router.queued > 2 * 3, "by the queue's order it would be late"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    simulate(main())


def test_pins_are_loaded_kept_and_let_go() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, slots=2, policy="cost")
        cluster.router.pin(ref("kept"), pinned=True)
        for name in "abc":
            await cluster.use(name, hold_s=2)
        assert "kept" in cluster.resident(0), "loaded ahead"
        cluster.router.pin(ref("kept"), pinned=False)
        for name in "abc":
            await cluster.use(name)
        assert "kept" not in cluster.resident(0)
        cluster.assert_at_rest()

    simulate(main())


def test_a_pin_that_cannot_be_loaded_is_tried_ever_less_often() -> None:
    async def main() -> None:
        failure = LoadError(LoadFault.ADAPTER_INVALID, "bad")
        loader = FakeLoader(0.0, fails=lambda a: failure if a.name == "bad" else None)
        cluster = Cluster(workers=1, slots=2, policy="cost", loader=loader)
        cluster.router.pin(ref("bad"), pinned=True)
        tries = []
        for _ in range(300):
            await cluster.use("a", hold_s=1)
            tries.append(sum(name == "bad" for _, name, _ in loader.calls))
        assert tries[9] in (3, 4)
        assert tries[63] in (6, 7)
        assert tries[-1] - tries[-121] in (1, 2, 3), "at most once a minute at last"
        loader.fails = lambda _: None
        for _ in range(90):
            await cluster.use("a", hold_s=1)
        assert "bad" in cluster.resident(0)
        cluster.router.pin(ref("bad"), pinned=False)
        cluster.assert_at_rest()

    simulate(main())


def test_a_late_word_of_a_worker_that_left_changes_nothing() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, slots=2)
        [old] = cluster.workers
        loading = cluster.start(cluster.use("a"))
        await settle()
        cluster.router.remove_worker(old)
        fresh = Worker(old.id, max_ongoing=4, slots=2)
        cluster.router.add_worker(fresh)
        cluster.router.hold(old, Hold.SILENT, held=False)
        cluster.router.observe(old, Report(seq=9, gpu=(ref("ghost"),)))
        assert old not in cluster.router.fleet.ready
        assert cluster.router.fleet.holders(ref("ghost")) == ()
        cluster.router.observe(fresh, Report(seq=9, gpu=(ref("a"),)))
        await asyncio.gather(loading, return_exceptions=True)
        assert cluster.router.fleet.holders(ref("a")) == (fresh,)

    simulate(main())


def test_an_adapter_that_a_worker_disowns_is_loaded_again() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, slots=1)
        await cluster.use("a")
        [worker] = cluster.workers
        both = [cluster.start(cluster.use("a", hold_s=hold_s)) for hold_s in (1, 5)]
        await settle()
        cluster.router.disown(worker, ref("a"))
        assert cluster.router.fleet.holders(ref("a")) == (worker,), "another one uses it"
        await both[0]
        cluster.router.disown(worker, ref("a"))
        assert cluster.router.fleet.holders(ref("a")) == ()
        await cluster.use("a")
        assert len(cluster.loader.calls) == 2
        await both[1]
        cluster.assert_at_rest()

    simulate(main())


def test_the_queue_is_bounded_and_its_timeout_is_kept() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, max_ongoing=1, max_queued=2, queue_timeout_s=5)
        loop = asyncio.get_running_loop()
        holding = cluster.start(cluster.use(None, hold_s=100))
        await settle()
        waiting = [cluster.start(cluster.use(None)) for _ in range(2)]
        await settle()
        with pytest.raises(Rejected) as full:
            await cluster.use(None)
        assert full.value.outcome is Outcome.QUEUE_FULL
        assert full.value.retry_after_s >= 1
        for task in waiting:
            with pytest.raises(Rejected) as late:
                await task
            assert late.value.outcome is Outcome.QUEUE_TIMEOUT
        assert loop.time() == pytest.approx(5)
        assert not holding.done()
        await holding
        cluster.assert_at_rest()

    simulate(main())


def test_a_deadline_earlier_than_the_timeout_counts() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, max_ongoing=1, queue_timeout_s=50)
        holding = cluster.start(cluster.use(None, hold_s=100))
        await settle()
        with pytest.raises(Rejected, match=r"waited 2 s"):
            await cluster.use(None, deadline=2.0)
        holding.cancel()

    simulate(main())


def test_who_waits_is_served_in_order() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, max_ongoing=1)
        served: list[int] = []

        async def one(number: int) -> None:
            await cluster.use(None, hold_s=1)
            served.append(number)

        await asyncio.gather(*(one(number) for number in range(10)))
        assert served == list(range(10))

    simulate(main())


@pytest.mark.parametrize("when", ["queued", "loading", "held", "granted and cancelled at once"])
def test_cancelling_releases_everything(when: str) -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, slots=1, max_ongoing=1)
        if when == "queued":
            holding = cluster.start(cluster.use("a", hold_s=10))
            await settle()
            task = cluster.start(cluster.use("a"))
            await settle()
            assert cluster.router.queued == 1
            task.cancel()
        elif when == "loading":
            task = cluster.start(cluster.use("a"))
            await asyncio.sleep(0.5)
            assert cluster.router.loading == 1
            task.cancel()
            holding = cluster.start(cluster.use("a"))
        elif when == "held":
            task = cluster.start(cluster.use("a", hold_s=50))
            await asyncio.sleep(2)
            task.cancel()
            holding = cluster.start(cluster.use("a"))
        else:
            holding = cluster.start(cluster.use("a"))
            await holding
            [worker] = cluster.workers
            cluster.router.hold(worker, Hold.SILENT, held=True)
            task = cluster.start(cluster.use("a"))
            await settle()
            cluster.router.hold(worker, Hold.SILENT, held=False)
            assert (cluster.router.queued, worker.in_flight) == (0, 1), "granted, not yet resumed"
            task.cancel()
        await asyncio.gather(task, holding, return_exceptions=True)
        assert task.cancelled()
        await asyncio.sleep(5)
        cluster.assert_at_rest()
        assert await cluster.use("a") == "w0"

    simulate(main())


def test_a_worker_that_goes_away_fails_its_loads_and_nobody_hangs() -> None:
    async def main() -> None:
        cluster = Cluster(workers=2, slots=1)
        tasks = [cluster.start(cluster.use("a")) for _ in range(3)]
        await settle()
        [(worker_id, _, _)] = cluster.loader.calls
        worker = cluster.router.fleet.get(worker_id)
        assert worker is not None
        cluster.router.remove_worker(worker)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, LoadError)
            assert result.fault is LoadFault.WORKER
        assert cluster.router.fleet.holders(ref("a")) == ()
        assert await cluster.use("a") != worker_id
        assert worker.in_flight == 0

    simulate(main())


def test_a_worker_that_goes_before_its_load_has_begun() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, slots=1)
        lease = cluster.router.lease(cluster.job("a"))
        entering = cluster.start(lease.__aenter__())
        await asyncio.sleep(0)  # placed, its load's task not yet started
        cluster.router.remove_worker(cluster.workers[0])
        with pytest.raises(LoadError):
            await entering
        assert cluster.router.loading == 0
        assert cluster.workers[0].in_flight == 0

    simulate(main())


def test_a_worker_that_joins_serves_who_waits() -> None:
    async def main() -> None:
        cluster = Cluster(workers=0)
        task = cluster.start(cluster.use("a"))
        await asyncio.sleep(3)
        assert cluster.router.queued == 1
        cluster.router.add_worker(Worker("new", max_ongoing=1, slots=1))
        assert await task == "new"

    simulate(main())


def test_a_worker_that_does_not_accept_gets_nothing_new() -> None:
    async def main() -> None:
        cluster = Cluster(workers=2)
        first = await cluster.use("a")
        worker = cluster.router.fleet.get(first)
        assert worker is not None
        cluster.router.hold(worker, Hold.SILENT, held=True)
        assert await cluster.use("a") != first
        cluster.router.hold(worker, Hold.SILENT, held=False)

    simulate(main())


def test_closing_turns_away_who_waits_and_lets_who_runs_finish() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, max_ongoing=1)
        running = cluster.start(cluster.use(None, hold_s=5))
        await settle()
        waiting = cluster.start(cluster.use(None))
        await settle()
        cluster.router.close()
        for refused in (waiting, cluster.start(cluster.use(None))):
            with pytest.raises(Rejected) as rejected:
                await refused
            assert rejected.value.outcome is Outcome.SHUTTING_DOWN
        assert await running == "w0"
        await cluster.router.aclose()
        cluster.assert_at_rest()

    simulate(main())


def test_a_retry_avoids_the_worker_that_failed_unless_it_is_the_only_one() -> None:
    async def main() -> None:
        cluster = Cluster(workers=2)
        first = await cluster.use("a")
        other = await cluster.use("a", avoid=(first,))
        assert other != first
        assert await cluster.use("a", avoid=("w0", "w1")) in {"w0", "w1"}
        assert await cluster.use(None, avoid=(first,)) == other

    simulate(main())


@pytest.mark.parametrize("policy", ["affinity", "round_robin"])
def test_a_retry_on_the_only_worker_goes_there_again(policy: str) -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, policy=policy)
        for adapter in ("a", None):
            assert await cluster.use(adapter, avoid=("w0",)) == "w0"

    simulate(main())


def test_the_retry_after_follows_the_drain_rate() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, max_ongoing=1, max_queued=100, queue_timeout_s=1000)
        assert cluster.router.retry_after_s == 1
        tasks = [cluster.start(cluster.use(None, hold_s=0.5)) for _ in range(101)]
        await asyncio.sleep(20)
        expected = (cluster.router.queued + 1) * 0.5
        assert cluster.router.retry_after_s == pytest.approx(expected, rel=0.1)
        await asyncio.gather(*tasks)
        await asyncio.sleep(8 * 3600)
        await cluster.use(None)
        assert cluster.router.retry_after_s == 1, "the silence is not counted"

    simulate(main())


def test_reports_correct_the_ledger_unless_a_load_has_overtaken_them() -> None:
    async def main() -> None:
        class Counting(FakeLoader):
            async def load(
                self, worker: Worker, adapter: AdapterRef, evict: AdapterRef | None
            ) -> int:
                await super().load(worker, adapter, evict)
                return 5

        cluster = Cluster(workers=1, slots=2, loader=Counting())
        [worker] = cluster.workers
        await cluster.use("a")
        cluster.router.observe(worker, Report(seq=4, running=3))
        assert worker.report.running == 3
        assert cluster.resident(0) == {"a"}, "the report is older than the load"
        cluster.router.observe(worker, Report(seq=5, gpu=(ref("b"),)))
        assert cluster.resident(0) == {"b"}, "it has lost a, and holds b"
        assert cluster.router.fleet.holders(ref("b")) == (worker,)
        assert cluster.router.fleet.holders(ref("a")) == ()
        holding = cluster.start(cluster.use("b", hold_s=5))
        await settle()
        cluster.router.observe(worker, Report(seq=6))
        assert cluster.resident(0) == {"b"}, "what is in use is not forgotten"
        await holding

    simulate(main())


def test_every_decision_says_why() -> None:
    async def main() -> None:
        cluster = Cluster(workers=2, slots=1, max_ongoing=1, queue_timeout_s=1)
        first = cluster.start(cluster.use("a", hold_s=10))
        await asyncio.sleep(2)
        second = cluster.start(cluster.use("a", hold_s=10))
        await asyncio.sleep(2)
        with pytest.raises(Rejected):
            await cluster.use("a")
        cold, spill = cluster.log.decisions
        assert cold.reason is Reason.COLD
        assert spill.reason is Reason.SPILL
        assert spill.dropped == ((cold.worker.id if cold.worker else "", "overloaded"),)
        await asyncio.gather(first, second)
        await cluster.use("a")
        await cluster.use(None)
        reasons = [decision.reason for decision in cluster.log.decisions[2:]]
        assert reasons == [Reason.HOLDER, Reason.BASE]

    simulate(main())


def test_a_prompt_that_was_given_up_holds_up_nobody() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, policy="cost")
        async with cluster.router.lease(cluster.job(prompt_tokens=8_000_000)) as lease:
            lease.answered(0, 0)
        started = asyncio.get_running_loop().time()
        await cluster.use(None, prompt_tokens=100)
        assert asyncio.get_running_loop().time() == started

    simulate(main())


def test_who_needs_much_memory_gets_it_under_a_load_of_small_ones() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, max_ongoing=64, policy="cost")
        cluster.workers[0].kv_tokens = 10_000
        small: dict[str, Any] = {"prompt_tokens": 100, "max_output_tokens": 100}
        tasks = []
        for _ in range(200):
            tasks.append(cluster.start(cluster.use(None, 2, **small)))
            await asyncio.sleep(0.04)
        big = cluster.start(cluster.use(None, 1, prompt_tokens=7000, max_output_tokens=100))
        for _ in range(400):
            tasks.append(cluster.start(cluster.use(None, 2, **small)))
            await asyncio.sleep(0.04)
        assert big.done()
        await asyncio.gather(big, *tasks)
        cluster.assert_at_rest()

    simulate(main())


def test_who_refuses_a_load_waits_for_memory_where_its_adapter_is() -> None:
    """Another worker has memory and not the adapter; this one the adapter, and no memory for long."""

    async def main() -> None:
        cluster = Cluster(workers=2, max_ongoing=400, policy="cost")  # one holder is enough
        here, other = cluster.workers
        assert await cluster.use("a") == here.id
        other.kv_tokens, here.kv_tokens = 1_000_000, 10_000
        small: dict[str, Any] = {"prompt_tokens": 2000, "max_output_tokens": 100}
        tasks = []
        for number in range(40):
            tasks.append(cluster.start(cluster.use("a", 2, refuse_cold=True, **small)))
            if number == 10:
                big = cluster.use("a", refuse_cold=True, prompt_tokens=7000, max_output_tokens=100)
                tasks.append(cluster.start(big))
            await asyncio.sleep(0.2)
            assert here.context_tokens <= here.kv_tokens
        assert tasks[11].done(), "and those that need little do not keep it out"
        assert {await task for task in tasks} == {here.id}
        cluster.assert_at_rest()

    simulate(main())


def test_a_prediction_that_turns_jobs_away_is_doubted() -> None:
    """Loads were slow and are fast again; nobody would be let in to show it."""

    async def main() -> None:
        cluster = Cluster(workers=1, slots=2, policy="cost", loader=FakeLoader(10.0))
        loop = asyncio.get_running_loop()
        for number in range(10):
            await cluster.use(f"slow{number}")
        cluster.loader.load_s = 0.1
        served = 0
        for number in range(100):
            with contextlib.suppress(Rejected):
                await cluster.use(f"fast{number}", deadline=loop.time() + 5)
                served += 1
            await asyncio.sleep(1)
        assert served > 50

    simulate(main())


def test_jobs_that_give_up_are_not_held_against_their_tenant() -> None:
    async def main() -> None:
        cluster = Cluster(workers=1, slots=0, max_ongoing=1, policy="cost")
        holding = cluster.start(cluster.use(None, hold_s=10, tenant="b"))
        await settle()
        flood = [
            cluster.start(cluster.use(None, tenant="a", prompt_tokens=5000)) for _ in range(50)
        ]
        await settle()
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        ended: list[str] = []

        async def one(tenant: str) -> None:
            await cluster.use(None, hold_s=1, tenant=tenant, prompt_tokens=100)
            ended.append(tenant)

        jobs = [cluster.start(one(tenant)) for tenant in "babababa"]
        await asyncio.gather(*jobs, holding)
        assert ended[:4].count("a") == 2
        cluster.assert_at_rest()

    simulate(main())
