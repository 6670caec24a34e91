import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

import pytest
import simpy

from sim.environment import Environment
from sim.loop import RanDryError, SimLoop, run

T = TypeVar("T")


def simulate(main: Coroutine[Any, Any, T]) -> T:
    return run(Environment(), main)


def test_time_passes_only_when_nothing_is_ready() -> None:
    async def main() -> list[tuple[float, str]]:
        loop = asyncio.get_running_loop()
        seen: list[tuple[float, str]] = []

        async def one(name: str, delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            seen.append((loop.time(), name))

        await asyncio.gather(one("b", 2), one("a", 1), one("c", 2))
        return seen

    assert simulate(main()) == [(1, "a"), (2, "b"), (2, "c")]


def test_asyncio_and_simpy_share_one_order_of_events() -> None:
    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        seen: list[str] = []

        def process() -> Generator[simpy.Event, None, str]:
            yield loop.env.timeout(1)
            seen.append("simpy 1")
            yield loop.env.timeout(2)
            seen.append("simpy 3")
            return "value"

        ended = loop.env.process(process())
        await asyncio.sleep(2)
        seen.append("asyncio 2")
        assert await loop.happens(ended) == "value"
        assert await loop.happens(ended) == "value", "an event that is past has its value"
        return seen

    assert simulate(main()) == ["simpy 1", "asyncio 2", "simpy 3"]


def test_timeouts_are_virtual() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await asyncio.Event().wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(99), timeout=1)
        return asyncio.get_running_loop().time()

    assert simulate(main()) == 3601


def test_a_deadlock_is_named() -> None:
    async def main() -> None:
        await asyncio.sleep(5)
        await asyncio.Event().wait()

    with pytest.raises(RanDryError, match=r"at 5\.0 s"):
        simulate(main())


def test_a_failure_in_a_callback_ends_the_run() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(1, lambda: 1 / 0)
        await asyncio.sleep(2)

    with pytest.raises(ZeroDivisionError):
        simulate(main())


def test_what_is_left_running_is_cancelled() -> None:
    ended: list[str] = []

    async def straggler() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append("cancelled")

    async def main() -> None:
        task = asyncio.create_task(straggler())
        await asyncio.sleep(1)
        assert not task.done()

    simulate(main())
    assert ended == ["cancelled"]


def test_there_are_no_sockets() -> None:
    async def main() -> None:
        await asyncio.open_connection("127.0.0.1", 1)

    with pytest.raises(NotImplementedError):
        simulate(main())


def test_cancelled_timers_do_not_pile_up() -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        fired: list[int] = []
        for number in range(20_000):
            timer = loop.call_later(1e6, fired.append, number)
            kept = (
                loop.call_later(1 + number % 7, fired.append, number) if number % 100 == 0 else None
            )
            timer.cancel()
            del kept
        await asyncio.sleep(10)
        assert len(fired) == 200
        assert fired == sorted(fired, key=lambda number: (number % 7, number))
        return len(loop.env._queue)

    assert simulate(main()) < 3000


def test_what_was_to_be_called_soon_can_be_cancelled() -> None:
    called: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(called.append, "never").cancel()
        loop.call_soon(called.append, "once")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await asyncio.sleep(1)

    run(Environment(), main())
    assert called == ["once"]
