"""A stock vLLM server: adapters by vLLM's own routes, and its own word on which it holds.

Each version is loaded under a name of its own, `base:adapter@version`, from a folder of its own: so two
versions are served at once, and neither is answered from prefix blocks of the other, which vLLM keys by
name and path (vllm#42125). A client says `base:adapter`, so its request's `model` is rewritten on its
way here (frontend/head.py), and the answer's `model` is the longer name. The server reads the folder
itself: the router's cache must be on a file system that both see.

At each poll it is asked what it lists (`GET /v1/models`), so that what somebody loaded or unloaded by
hand, and what a restart has lost, is noticed. A listing that overlaps a change of ours does not count:
it may be of before or of after. Adapters of any other name are not ours, and let be. vLLM registers any
number of adapters and brings them into its `max_loras` slots by itself, the least recently used out, so
those beyond the slots that the router counts cost reloads and no error. It knows nothing of other
routers: two that share it may unload what the other uses, and then load it again.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from engine_worker.protocol import AdapterId, Info, State
from router.adapters.store import is_name
from router.core.job import AdapterRef, LoadError, LoadFault
from router.workers.client import (
    BAD_REQUEST,
    CONTROL_TIMEOUT_S,
    NOT_FOUND,
    OK,
    UNLOAD_TIMEOUT_S,
    WorkerUnreachableError,
    describe,
    is_healthy,
    message_of,
    post,
    refusal,
)
from router.workers.upstream import UpstreamPool

POLL_S: Final = 1.0
# Of the process itself, where it serves metrics of one: it changes with a restart.
STARTED: Final = "process_start_time_seconds"
METRICS: Final = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    STARTED,
)


class _Card(msgspec.Struct):
    """One of `GET /v1/models`; an adapter's has its base model as `parent`, its path as `root`."""

    id: str
    root: str | None = None
    parent: str | None = None


class _Listing(msgspec.Struct):
    data: list[_Card]


async def served_models(session: aiohttp.ClientSession, url: str) -> list[str]:
    """The ids that an OpenAI-compatible server lists. Raises `WorkerUnreachableError`."""
    return [card.id for card in await _read_listing(session, url)]


async def _read_listing(session: aiohttp.ClientSession, url: str) -> list[_Card]:
    try:
        timeout = aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S)
        async with session.get(f"{url}/v1/models", timeout=timeout) as answer:
            body = await answer.read()
            if answer.status != OK:
                raise WorkerUnreachableError(
                    f"{url}/v1/models answers {answer.status}: {message_of(body)}"
                )
            return msgspec.json.decode(body, type=_Listing).data
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise WorkerUnreachableError(f"{url}: {describe(error)}") from None
    except msgspec.DecodeError:
        raise WorkerUnreachableError(f"{url}/v1/models does not answer as vLLM does") from None


class StockVllmClient:
    """One stock vLLM server that serves `model_id`.

    Its states are numbered here: by each change of ours, and each listing that is another than before.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        worker_id: str,
        upstreams: UpstreamPool,
        model_id: str,
    ) -> None:
        self.session = session
        self.url = url
        self.upstreams = upstreams
        self._worker_id = worker_id
        self._model_id = model_id
        self._seq = 0
        self._listed: tuple[AdapterId, ...] = ()
        self._paths: dict[AdapterId, str] = {}  # from where we loaded what is listed
        self._changes = 0  # of ours, that are over
        self._changing = asyncio.Lock()
        self._started = 0.0

    async def load(
        self,
        adapter: AdapterId,
        path: Path,
        evict: AdapterId | None,
        drain_s: float = 0.0,  # noqa: ARG002  (it knows of no other routers)
    ) -> int:
        """Load, then unload the evicted."""
        async with self._change():
            await self._serve(adapter, str(path))
            if evict is not None:
                # What was loaded is loaded; what stays in the list is noticed there.
                with contextlib.suppress(LoadError):
                    await self._drop(evict)
        return self._seq

    async def unload(self, adapter: AdapterId) -> int:
        """Unload the version's own name."""
        async with self._change():
            await self._drop(adapter)
        return self._seq

    def model_for(self, adapter: AdapterRef) -> str:
        """The version's own name."""
        return f"{adapter.model_id}@{adapter.version}"

    @contextlib.asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """One at a time; a listing that was begun before its end does not count."""
        async with self._changing:
            try:
                yield
            finally:
                self._changes += 1
                self._seq += 1

    async def _serve(self, adapter: AdapterId, path: str) -> None:
        # Never in place: vLLM then reads the weights again at every step (0.32).
        status, answer = await self._post_load(adapter, path)
        if status == BAD_REQUEST and b"already been loaded" in answer:
            if (await self._listed_now()).get(adapter) == path:
                self._paths[adapter] = path
                return
            await self._drop(adapter)
            status, answer = await self._post_load(adapter, path)
        if status != OK:
            raise self._refusal(status, answer)
        self._paths[adapter] = path

    async def _post_load(self, adapter: AdapterId, path: str) -> tuple[int, bytes]:
        body = msgspec.json.encode({"lora_name": _name(adapter), "lora_path": path})
        return await post(self.session, f"{self.url}/v1/load_lora_adapter", body, self._worker_id)

    async def _drop(self, adapter: AdapterId) -> None:
        body = msgspec.json.encode({"lora_name": _name(adapter)})
        url = f"{self.url}/v1/unload_lora_adapter"
        status, answer = await post(
            self.session, url, body, self._worker_id, timeout_s=UNLOAD_TIMEOUT_S
        )
        if status != OK and not (status == NOT_FOUND and b"cannot be found" in answer):
            raise self._refusal(status, answer)
        self._paths.pop(adapter, None)

    def _refusal(self, status: int, answer: bytes) -> LoadError:
        if status == NOT_FOUND and b"Not Found" in answer:
            return LoadError(
                LoadFault.WORKER,
                f"worker {self._worker_id} cannot load adapters; start its vLLM with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora",
            )
        return refusal(status, answer, self._worker_id)

    async def _listed_now(self) -> dict[AdapterId, str]:
        try:
            return await self._read_adapters()
        except WorkerUnreachableError as error:
            raise LoadError(LoadFault.WORKER, f"worker {self._worker_id}: {error}") from None

    async def _read_adapters(self) -> dict[AdapterId, str]:
        """The adapters that it lists, of those whose name has our form, with their folders."""
        found: dict[AdapterId, str] = {}
        for card in await _read_listing(self.session, self.url):
            name, at, version = card.id.rpartition("@")
            base, _, adapter = name.rpartition(":")
            if at and card.parent is not None and base == self._model_id and is_name(adapter):
                found[AdapterId(name, version)] = card.root or ""
        return found

    async def states(self) -> AsyncIterator[State]:
        """Nothing is pushed: ask from time to time."""
        while True:
            if not await is_healthy(self.session, self.url):
                raise WorkerUnreachableError(f"{self._worker_id} is not healthy")
            yield await self._state()
            await asyncio.sleep(POLL_S)

    async def _state(self) -> State:
        """Its metrics, and last of all its listing: nothing comes between that and its use."""
        running, waiting, kv_usage, started = await self._read_metrics()
        if self._started and started and started != self._started:
            raise WorkerUnreachableError(f"{self._worker_id} was started again")
        self._started = started or self._started
        changes, changing = self._changes, self._changing.locked()
        listed = await self._read_adapters()
        seq = -1  # older than any load: it says nothing of adapters
        held: tuple[AdapterId, ...] = ()
        if not changing and not self._changing.locked() and changes == self._changes:
            # From another folder than ours it is not what its name says.
            held = tuple(
                adapter
                for adapter, root in listed.items()
                if self._paths.get(adapter, root) == root
            )
            self._paths = {
                adapter: path for adapter, path in self._paths.items() if adapter in listed
            }
            if held != self._listed:
                self._listed = held
                self._seq += 1
            seq = self._seq
        return State(
            seq=seq, running=int(running), waiting=int(waiting), kv_usage=kv_usage, gpu=held
        )

    async def _read_metrics(self) -> list[float]:
        values = dict.fromkeys(METRICS, 0.0)
        try:
            timeout = aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S)
            async with self.session.get(f"{self.url}/metrics", timeout=timeout) as answer:
                text = (await answer.read()).decode() if answer.status == OK else ""
            for family in text_string_to_metric_families(text):
                if family.name in values:
                    values[family.name] = sum(sample.value for sample in family.samples)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise WorkerUnreachableError(f"{self._worker_id}: {describe(error)}") from None
        return list(values.values())

    async def info(self) -> Info | None:
        """It has no such route."""
        return None

    async def close(self) -> None:
        """Close its connections."""
        self.upstreams.close()
        await self.session.close()


def _name(adapter: AdapterId) -> str:
    """What the server calls it."""
    return f"{adapter.name}@{adapter.version}"
