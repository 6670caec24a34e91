"""Measure the points of a design on a running engine, from outside, as a client sees it.

A step of the engine gives every stream one token: while n streams all decode, the time between two
tokens of one stream is the time of one step of n requests. What a client cannot see, the way of a
request to the engine and of a token back, is a constant of its own (`request_overhead_s`).
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Final, TypeAlias, assert_never

import aiohttp
import msgspec

from sim.calibrate.design import DECODE_TOKENS, Decode, Load, Mixed, Point, Prompt
from sim.calibrate.target import Stream, Target, TargetError

MARK: Final = ":calibrate-"  # in the name of each adapter that is loaded to be measured
PARTS: Final = 3  # of a window in which all decode
MIXED_TOKENS: Final = 16  # of the streams that a prompt joins
NEIGHBOUR_STREAMS: Final = 4
NEIGHBOUR_TOKENS: Final = 64


class StepSeen(msgspec.Struct, frozen=True, tag="step"):
    """Steps of one composition: how many tokens their requests read, and what one took, in seconds."""

    point: Decode | Mixed
    context: float
    step_s: float


class PromptSeen(msgspec.Struct, frozen=True, tag="prompt"):
    """A prompt alone: seconds from asking to its token."""

    point: Prompt
    ttft_s: float


class LoadSeen(msgspec.Struct, frozen=True, tag="load"):
    """A load on an idle engine: seconds."""

    point: Load
    load_s: float


Seen: TypeAlias = StepSeen | PromptSeen | LoadSeen


class Bench:
    """One engine, the others on its host, and an adapter to load under many names."""

    def __init__(self, target: Target, beside: Sequence[Target], adapter_path: str | None) -> None:
        self._target = target
        self._beside = beside
        self._path = adapter_path
        self._loaded: dict[Target, list[str]] = {}
        self._names = 0
        self._run = f"{time.time_ns():x}"

    async def warm_up(self) -> None:
        """Let every engine compile, allocate and connect before anything counts.

        What a measurement that was killed has left in their slots is dropped.
        """
        for target in (self._target, *self._beside):
            for name in await target.held() if target.info.max_loras else ():
                if MARK in name:
                    await target.unload(name)
            await target.complete(64, 4, None)
            await asyncio.gather(*(target.complete(16, 4, None) for _ in range(4)))

    async def measure(self, point: Point) -> list[Seen]:
        """Measure one point."""
        match point:
            case Decode():
                async with self._noise(point.beside):
                    return list(await self._decode(point))
            case Mixed():
                return list(await self._mixed(point))
            case Prompt():
                async with self._noise(point.beside):
                    name = (await self._adapters(self._target, 1))[0] if point.adapter else None
                    stream = await self._target.complete(point.tokens, 1, name)
                    return [PromptSeen(point, stream.came[0] - stream.asked)]
            case Load():
                return [LoadSeen(point, await self._load(point.tier))]
        assert_never(point)

    async def _decode(self, point: Decode) -> list[StepSeen]:
        names: list[str | None] = [None]
        if point.adapters:
            names = list(await self._adapters(self._target, point.adapters))
        streams = await asyncio.gather(
            *(
                self._target.complete(point.prompt, DECODE_TOKENS, names[number % len(names)])
                for number in range(point.requests)
            )
        )
        return list(steps_of(point, streams))

    async def _mixed(self, point: Mixed) -> list[StepSeen]:
        """The step in which a prompt joins streams that decode, as those streams see it."""
        names: list[str | None] = [None]
        if point.adapters:
            names = list(await self._adapters(self._target, point.adapters))
        began = [asyncio.Event() for _ in range(point.requests)]
        decoding = [
            asyncio.ensure_future(
                self._target.complete(
                    point.prompt, MIXED_TOKENS, names[number % len(names)], began[number]
                )
            )
            for number in range(point.requests)
        ]
        try:
            for one, task in zip(began, decoding, strict=True):
                # One that fails before it decodes ends the wait; it is raised below.
                task.add_done_callback(partial(_tell, one))
                await one.wait()
            joined = await self._target.complete(point.tokens, 1, names[0])
            streams = await asyncio.gather(*decoding)
        finally:
            for task in decoding:
                task.cancel()
        moment = joined.came[0]
        if moment >= min(stream.came[-1] for stream in streams):
            return []  # they had ended before it was computed
        took = [stream.step_until(moment, joined.asked) for stream in streams]
        seen = [step_s for step_s in took if step_s is not None and step_s > 0]
        if not seen:
            return []
        decoded = sum(one <= moment for stream in streams for one in stream.came)
        return [StepSeen(point, point.requests * point.prompt + decoded, median(seen))]

    async def _adapters(self, target: Target, count: int) -> list[str]:
        """So many adapters in slots of the engine: the first ones that were loaded."""
        assert self._path is not None
        loaded = self._loaded.setdefault(target, [])
        while len(loaded) < count:
            loaded.append(await self._load_new(target))
        return loaded[:count]

    async def _load_new(self, target: Target, evict: Iterable[str] = ()) -> str:
        assert self._path is not None
        self._names += 1
        name = f"{target.info.model_id}{MARK}{self._run}-{self._names}"
        await target.load(name, self._path, tuple(evict))
        return name

    async def _load(self, tier: str) -> float:
        """Time a load. The adapter that it replaces is one of those that were loaded before."""
        assert self._path is not None
        target = self._target
        loaded = self._loaded.setdefault(target, [])
        victim = [loaded.pop()] if len(loaded) >= target.info.max_loras else []
        self._names += 1
        name = f"{target.info.model_id}{MARK}{self._run}-{self._names}"
        load_s = await target.load(name, self._path, victim)
        loaded.append(name)
        if tier == "host" and victim:
            load_s = await target.load(victim[0], self._path, [loaded.pop()])
            loaded.append(victim[0])
        return load_s

    @contextlib.asynccontextmanager
    async def _noise(self, beside: bool) -> AsyncIterator[None]:
        """Keep the other workers of the host busy, where that is asked for."""
        if not beside:
            yield
            return
        busy = [
            asyncio.ensure_future(self._busy(target))
            for target in self._beside
            for _ in range(NEIGHBOUR_STREAMS)
        ]
        await asyncio.sleep(0.3)  # until their first steps
        try:
            yield
        finally:
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)

    @staticmethod
    async def _busy(target: Target) -> None:
        while True:
            await target.complete(16, NEIGHBOUR_TOKENS, None)

    async def close(self) -> None:
        """Drop what was loaded."""
        for target, names in self._loaded.items():
            for name in names:
                with contextlib.suppress(TargetError, aiohttp.ClientError, OSError):
                    await target.unload(name)  # where the engine is gone, so are they
        self._loaded.clear()


def _tell(event: asyncio.Event, _: object) -> None:
    event.set()


def steps_of(point: Decode, streams: Sequence[Stream]) -> Iterable[StepSeen]:
    """The steps in which all streams decode: from the last one's first token to the first one's end.

    They are read off that last stream, in a few parts, so that contexts differ.
    """
    last = max(streams, key=lambda stream: stream.came[0])
    end = min(stream.came[-1] for stream in streams)
    seen = [moment for moment in last.came if moment <= end + 1e-9]
    if len(seen) <= PARTS:
        return
    bounds = [round(part * (len(seen) - 1) / PARTS) for part in range(PARTS + 1)]
    for start, stop in pairwise(bounds):
        # The step that gave token k read the prompt and the k tokens before it.
        tokens = (start + stop + 1) / 2
        step_s = (seen[stop] - seen[start]) / (stop - start)
        if step_s > 0 and math.isfinite(step_s):
            yield StepSeen(point, point.requests * (point.prompt + tokens), step_s)
