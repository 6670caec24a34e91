"""Running a coroutine in a test that is none itself.

`asyncio.run` in the test's own thread drops, unclosed, the loop that pytest-asyncio keeps there; the
warning then fails whichever test the garbage collector runs in.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run_in_a_thread(function: Callable[[], T]) -> T:
    """Call what calls `asyncio.run` itself."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def run_apart(main: Coroutine[Any, Any, T]) -> T:
    """Run it in a thread of its own."""
    return run_in_a_thread(lambda: asyncio.run(main))
