"""Send a workload to a running router, each request at its time, whatever became of the others.

Open loop: a client that waited for answers would slow down with the server, and hide its queue
(Schroeder and others, "Open versus closed: a cautionary tale", NSDI 2006). Prompts are random token
ids of exactly the wanted length, anew in each run, so that no prefix is found; answers are made to have
exactly theirs. The `x-session-id` of each request says which case and run it belongs to.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

import aiohttp
import msgspec

from sim.calibrate.prompts import random_prompt
from sim.traces import TraceRow

HTTP_OK: Final = 200


async def drive(
    client: aiohttp.ClientSession,
    url: str,
    rows: Sequence[TraceRow],
    label: str,
    *,
    seed: str,
    progress: Callable[[], None],
) -> int:
    """Send every row; return how many were not answered with 200."""
    random = Random(seed)
    bodies = [_body(row, random) for row in rows]
    started = time.perf_counter()
    failed = 0

    async def one(row: TraceRow, body: bytes) -> None:
        nonlocal failed
        wait_s = started + (row.timestamp - rows[0].timestamp) / 1000 - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        headers = {"Content-Type": "application/json", "x-session-id": label}
        async with client.post(f"{url}/v1/completions", data=body, headers=headers) as answer:
            await answer.read()
            failed += answer.status != HTTP_OK
        progress()

    await asyncio.gather(*(one(row, body) for row, body in zip(rows, bodies, strict=True)))
    return failed


def _body(row: TraceRow, random: Random) -> bytes:
    body: dict[str, Any] = {
        "model": row.model,
        "prompt": random_prompt(random, row.input_length),
        "max_tokens": row.output_length,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return msgspec.json.encode(body)
