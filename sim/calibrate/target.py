"""The engine under measurement: one of our engine workers, or a stock vLLM server.

Prompts are lists of token ids, so that their lengths are exact, drawn anew each time, so that no
prefix is found in the cache.
"""

import asyncio
import time
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any, Final

import aiohttp
import msgspec

from engine_worker.protocol import (
    ADAPTERS,
    INFO,
    LOAD,
    TOKEN_ENV,
    UNLOAD,
    AdapterId,
    Info,
    LoadReply,
    LoadRequest,
    State,
    UnloadRequest,
)
from sim.calibrate.prompts import random_prompt
from sim.errors import UserError

NO_TOKEN: Final = b"[DONE]"
DECODES: Final = 2  # pieces, after which an answer decodes


class TargetError(UserError):
    """The engine cannot be reached or measured. The message says what to do."""


class Stream(msgspec.Struct):
    """One streamed answer: when it was asked for, and when each of its pieces came, in seconds."""

    asked: float
    came: list[float]

    def step_until(self, moment: float, since: float) -> float | None:
        """How long the step took that ended at `moment`, of those that ended after `since`.

        The time from the last piece before `since` to the one of `moment`, less a usual step for each
        other one in it. A single gap would not do: an engine that schedules ahead hands out the tokens
        of the step before late. None where there is no such stretch.
        """
        usual = median(later - earlier for earlier, later in pairwise(self.came))
        before = [index for index, came in enumerate(self.came) if came <= since]
        until = [index for index, came in enumerate(self.came) if came <= moment + usual / 2]
        if not before or not until or until[-1] <= before[-1]:
            return None
        steps = until[-1] - before[-1]
        return self.came[until[-1]] - self.came[before[-1]] - (steps - 1) * usual


class Target:
    """One engine behind HTTP. `adapter_path` is a folder that the engine can read."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, info: Info, *, ours: bool, seed: str
    ) -> None:
        self._session = session
        self.url = url
        self.info = info
        self.ours = ours
        self._random = Random(seed)

    async def complete(
        self,
        prompt_tokens: int,
        tokens: int,
        adapter: str | None,
        began: asyncio.Event | None = None,
    ) -> Stream:
        """Ask for exactly so many tokens after so many, and note when they come.

        `began` is set when there are two of them: from then on it decodes.
        """
        body: dict[str, Any] = {
            "model": adapter or self.info.model_id,
            "prompt": random_prompt(self._random, prompt_tokens),
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        came: list[float] = []
        asked = time.perf_counter()
        async with self._session.post(
            f"{self.url}/v1/completions",
            data=msgspec.json.encode(body),
            headers={"Content-Type": "application/json"},
        ) as answer:
            if answer.status != 200:  # noqa: PLR2004
                raise TargetError(f"{self.url}: {answer.status}: {(await answer.text())[:300]}")
            async for line in answer.content:
                if line.startswith(b"data: ") and NO_TOKEN not in line:
                    came.append(time.perf_counter())
                    if began is not None and len(came) == DECODES:
                        began.set()
        if not came:
            raise TargetError(f"{self.url}: an answer without a token")
        return Stream(asked, came)

    async def load(self, name: str, path: str, evict: Sequence[str] = ()) -> float:
        """Load an adapter, dropping others; how long the engine took, in seconds."""
        if self.ours:
            request = LoadRequest(
                AdapterId(name, "1"), path, tuple(AdapterId(other, "1") for other in evict)
            )
            data = await self._post(LOAD, msgspec.json.encode(request))
            return msgspec.json.decode(data, type=LoadReply).load_s
        for other in evict:
            await self.unload(other)
        started = time.perf_counter()
        body = msgspec.json.encode({"lora_name": name, "lora_path": path})
        await self._post("/v1/load_lora_adapter", body)
        return time.perf_counter() - started

    async def unload(self, name: str) -> None:
        """Drop an adapter."""
        if self.ours:
            request = UnloadRequest(AdapterId(name, "1"))
            await self._post(UNLOAD, msgspec.json.encode(request))
        else:
            await self._post("/v1/unload_lora_adapter", msgspec.json.encode({"lora_name": name}))

    async def held(self) -> list[str]:
        """The adapters that it holds, by name."""
        path = ADAPTERS if self.ours else "/v1/models"
        async with self._session.get(self.url + path) as answer:
            data = await answer.read()
            if answer.status != 200:  # noqa: PLR2004
                raise TargetError(f"{self.url}{path}: {answer.status}: {data[:300].decode()}")
        if self.ours:
            state = msgspec.json.decode(data, type=State)
            return [adapter.name for adapter in (*state.gpu, *state.host)]
        return [str(one["id"]) for one in msgspec.json.decode(data)["data"]]

    async def _post(self, path: str, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self.url + path, data=body, headers=headers) as answer:
            data = await answer.read()
            if answer.status != 200:  # noqa: PLR2004
                raise TargetError(f"{self.url}{path}: {answer.status}: {data[:300].decode()}")
            return data


async def reach(
    session: aiohttp.ClientSession, url: str, stock: Info | None, *, seed: str
) -> Target:
    """Find out what answers at `url`. `stock` describes it where it is not an engine worker of ours.

    Raises `TargetError`.
    """
    url = url.rstrip("/")
    try:
        async with session.get(url + INFO) as answer:
            if answer.status == 200:  # noqa: PLR2004
                info = msgspec.json.decode(await answer.read(), type=Info)
                return Target(session, url, info, ours=True, seed=seed)
            if answer.status == 401:  # noqa: PLR2004
                raise TargetError(f"{url}: wrong token; set {TOKEN_ENV} to the worker's")
        if stock is None:
            raise TargetError(
                f"{url} is no engine worker of ours; for a stock vLLM server say how it was started: "
                "--max-loras, --max-lora-rank, --max-num-seqs, --max-num-batched-tokens, "
                "--max-model-len"
            )
        async with session.get(url + "/v1/models") as answer:
            served = msgspec.json.decode(await answer.read())
        async with session.get(url + "/version") as answer:
            version = msgspec.json.decode(await answer.read())["version"]
        async with session.get(url + "/metrics") as answer:
            metrics = await answer.text()
    except (aiohttp.ClientError, OSError, msgspec.DecodeError, KeyError) as error:
        raise TargetError(
            f"{url} does not answer as vLLM does ({type(error).__name__}: {error})"
        ) from None
    blocks, block_size = cache_config(metrics)
    info = msgspec.structs.replace(
        stock,
        engine_version=str(version),
        model_id=str(served["data"][0]["id"]),
        kv_tokens=blocks * block_size,
        block_size=block_size,
    )
    return Target(session, url, info, ours=False, seed=seed)


def cache_config(metrics: str) -> tuple[int, int]:
    """Blocks and tokens a block, from the labels of vLLM's `vllm:cache_config_info`."""
    found: dict[str, str] = {}
    for line in metrics.splitlines():
        if line.startswith("vllm:cache_config_info{"):
            labels = line.partition("{")[2].rpartition("}")[0]
            found = dict(item.split("=", 1) for item in labels.split(",") if "=" in item)
            break
    try:
        return int(found["num_gpu_blocks"].strip('"')), int(found["block_size"].strip('"'))
    except (KeyError, ValueError):
        raise TargetError("no vllm:cache_config_info in /metrics; is it a vLLM server?") from None
