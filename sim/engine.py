"""A continuous-batching engine as a SimPy process: what vLLM's scheduler does, step by step.

One step takes every running request one token further and spends what is left of the token budget
on prompts, in chunks. Requests wait in order; one whose adapter would be one too many in the batch
is passed by, as vLLM does. Memory for a request's whole length is set aside when it is admitted.
A load happens between two steps and stalls them all.

When a batch can only decode until its next completion, the steps up to there are taken as one event:
nothing but an arrival, a load or an abort can change them, and those end it at a step's boundary.

The process knows only its environment: the simulator's virtual one, or one that is paced by the
real clock (the emulated engine of `engine_worker`).
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable
from typing import Annotated, Final

import msgspec
import simpy

from sim.latency import LatencyModel

Positive = Annotated[int, msgspec.Meta(ge=1)]


class EngineLimits(msgspec.Struct, frozen=True):
    """The engine arguments that the model knows, with vLLM's names and defaults."""

    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive = 8192
    max_loras: Positive = 1
    max_cpu_loras: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_lora_rank: Positive = 16
    max_model_len: Positive = 131072


class EngineRequest:
    """One request inside the engine. `done` succeeds when its last token is out, or on abort."""

    __slots__ = (
        "aborted",
        "adapter",
        "arrived",
        "done",
        "end_tick",
        "finished",
        "first_token",
        "on_token",
        "output_tokens",
        "prompt_left",
        "prompt_tokens",
    )

    def __init__(
        self,
        env: simpy.Environment,
        *,
        adapter: Hashable | None,
        prompt_tokens: int,
        output_tokens: int,
        on_token: Callable[[], None] | None = None,
    ) -> None:
        self.adapter = adapter
        self.prompt_tokens = max(1, prompt_tokens)
        self.output_tokens = max(1, output_tokens)
        self.prompt_left = self.prompt_tokens
        self.done = env.event()
        self.arrived = env.now
        self.first_token: float | None = None
        self.finished: float | None = None
        self.aborted = False
        self.end_tick = 0
        self.on_token = on_token

    @property
    def kv_tokens(self) -> int:
        """What it needs of the KV memory at its longest."""
        return self.prompt_tokens + self.output_tokens


class EngineCounters(msgspec.Struct):
    """What an engine did in all."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0
    stalled_s: float = 0.0
    loads: int = 0
    running_peak: int = 0
    waiting_peak: int = 0


class _Load:
    __slots__ = ("adapter", "done", "evict")

    def __init__(self, adapter: Hashable, evict: Hashable | None, done: simpy.Event) -> None:
        self.adapter = adapter
        self.evict = evict
        self.done = done


class SimEngine:
    """One engine. `submit`, `abort`, `load` and `unload` are its interface; all return at once.

    `on_change` is called when what a worker would report has changed. `jump` allows steps in which
    nothing changes to be taken as one event; it is off where every token must be seen in its time.
    """

    def __init__(
        self,
        env: simpy.Environment,
        latency: LatencyModel,
        limits: EngineLimits,
        *,
        on_change: Callable[[], None] | None = None,
        jump: bool = True,
    ) -> None:
        self.env = env
        self.latency = latency
        self.limits = limits
        self.counters = EngineCounters()
        self.gpu: OrderedDict[Hashable, None] = OrderedDict()
        self.host: OrderedDict[Hashable, None] = OrderedDict()
        self.host_slots: Final = max(limits.max_cpu_loras, limits.max_loras + 1)
        self._on_change = on_change
        self._jump = jump
        self._waiting: deque[EngineRequest] = deque()
        self._prefilling: list[EngineRequest] = []
        self._decoding: list[tuple[int, int, EngineRequest]] = []  # a heap by the last tick
        self._running = 0
        self._batch_adapters: dict[Hashable, int] = {}
        self._loads: deque[_Load] = deque()
        self._kv_free = latency.kv_tokens
        self._tick = 0
        self._order = 0
        self._idle: simpy.Event | None = None
        self._interrupt: simpy.Event | None = None
        self._process = env.process(self._run())

    # What a worker reports.

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return self._running

    @property
    def waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV memory that is set aside, 0 to 1."""
        return 1.0 - self._kv_free / self.latency.kv_tokens

    # What can be asked of it.

    def submit(self, request: EngineRequest) -> bool:
        """Queue a request; False where it could never fit, and it is not queued."""
        if request.kv_tokens > min(self.latency.kv_tokens, self.limits.max_model_len):
            return False
        self.counters.requests += 1
        self._waiting.append(request)
        self.counters.waiting_peak = max(self.counters.waiting_peak, len(self._waiting))
        self._awaken()
        self._changed()
        return True

    def abort(self, request: EngineRequest) -> None:
        """The client is gone: free what the request holds. Harmless after its end."""
        if request.done.triggered:
            return
        request.aborted = True
        if request in self._waiting:
            self._waiting.remove(request)
        else:
            if request in self._prefilling:
                self._prefilling.remove(request)
            else:
                self._decoding = [item for item in self._decoding if item[2] is not request]
                heapq.heapify(self._decoding)
            self._leave_batch(request)
        request.done.succeed()
        self._awaken()
        self._changed()

    def load(self, adapter: Hashable, evict: Hashable | None = None) -> simpy.Event:
        """Bring an adapter into a GPU slot, then drop `evict`; the event is its completion."""
        done = self.env.event()
        self._loads.append(_Load(adapter, evict, done))
        self._awaken()
        return done

    def evict(self, adapter: Hashable) -> None:
        """Drop an adapter from its GPU slot; it stays in host memory for as long as that lasts."""
        self.gpu.pop(adapter, None)
        self._changed()

    def unload(self, adapter: Hashable) -> None:
        """Drop an adapter from its GPU slot and from host memory."""
        self.gpu.pop(adapter, None)
        self.host.pop(adapter, None)
        self._changed()

    # The process.

    def _run(self) -> Generator[simpy.Event, None, None]:
        env = self.env
        while True:
            while self._loads:
                load = self._loads.popleft()
                stall_s = self._load_s(load.adapter)
                if stall_s:
                    self.counters.stalled_s += stall_s
                    yield env.timeout(stall_s)
                self._install(load)
            self._admit()
            if not self._running:
                self._idle = env.event()
                yield self._idle
                self._idle = None
                continue
            chunks, prefilled = self._chunks()
            step_s = self.latency.step_s(self._running, prefilled, len(self._batch_adapters))
            steps = 1
            if self._jump and not chunks:
                steps = self._decoding[0][0] - self._tick
            if steps == 1:
                yield env.timeout(step_s)
                self._advance(1, step_s, chunks)
                continue
            started = env.now
            self._interrupt = interrupt = env.event()
            end = env.timeout(steps * step_s, interrupt)
            end.callbacks.append(self._end_of_jump)
            yield interrupt
            self._interrupt = None
            whole = int((env.now - started) / step_s)
            if whole < steps:
                boundary = started + (whole + 1) * step_s
                yield env.timeout(max(0.0, boundary - env.now))
                whole += 1
            self._advance(min(whole, steps), step_s, chunks)

    @staticmethod
    def _end_of_jump(end: simpy.Event) -> None:
        interrupt = end.value
        assert interrupt is not None
        if not interrupt.triggered:
            interrupt.succeed()

    def _awaken(self) -> None:
        for event in (self._idle, self._interrupt):
            if event is not None and not event.triggered:
                event.succeed()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change()

    # One step.

    def _admit(self) -> None:
        """Move waiting requests into the batch, in order, for as long as there is room."""
        limits, waiting = self.limits, self._waiting
        passed: list[EngineRequest] = []
        # A prompt that is under way takes the whole budget until it is done.
        while waiting and self._running < limits.max_num_seqs and self._budget() > 0:
            request = waiting.popleft()
            adapter = request.adapter
            if (
                adapter is not None
                and adapter not in self._batch_adapters
                and len(self._batch_adapters) >= limits.max_loras
            ):
                passed.append(request)
                continue
            if request.kv_tokens > self._kv_free:
                waiting.appendleft(request)
                break
            self._kv_free -= request.kv_tokens
            self._running += 1
            if adapter is not None:
                self._batch_adapters[adapter] = self._batch_adapters.get(adapter, 0) + 1
                if adapter in self.gpu:
                    self.gpu.move_to_end(adapter)
                    self.host.move_to_end(adapter)
            self._prefilling.append(request)
        waiting.extendleft(reversed(passed))
        self.counters.running_peak = max(self.counters.running_peak, self._running)

    def _budget(self) -> int:
        """Prompt tokens that the coming step has room for."""
        planned = len(self._decoding) + sum(request.prompt_left for request in self._prefilling)
        return self.limits.max_num_batched_tokens - planned

    def _chunks(self) -> tuple[list[tuple[EngineRequest, int]], int]:
        """Share the token budget among the prompts, first come first served."""
        budget = self.limits.max_num_batched_tokens - len(self._decoding)
        chunks: list[tuple[EngineRequest, int]] = []
        total = 0
        for request in self._prefilling:
            chunk = min(request.prompt_left, budget - total)
            if chunk <= 0:
                break
            chunks.append((request, chunk))
            total += chunk
        return chunks, total

    def _advance(self, steps: int, step_s: float, chunks: list[tuple[EngineRequest, int]]) -> None:
        """The steps have been taken: hand out their tokens."""
        counters, decoding = self.counters, self._decoding
        self._tick += steps
        counters.steps += steps
        counters.busy_s += steps * step_s
        counters.output_tokens += steps * len(decoding)
        if not self._jump:
            for _, _, request in sorted(decoding, key=lambda item: item[1]):
                if request.on_token is not None:
                    request.on_token()
        while decoding and decoding[0][0] <= self._tick:
            self._finish(heapq.heappop(decoding)[2])
        for request, chunk in chunks:
            if request.aborted:
                continue
            request.prompt_left -= chunk
            counters.prompt_tokens += chunk
            if request.prompt_left:
                continue
            self._prefilling.remove(request)
            request.first_token = self.env.now
            counters.output_tokens += 1
            if request.on_token is not None:
                request.on_token()
            if request.output_tokens == 1:
                self._finish(request)
            else:
                self._order += 1
                request.end_tick = self._tick + request.output_tokens - 1
                heapq.heappush(decoding, (request.end_tick, self._order, request))
        self._changed()

    def _finish(self, request: EngineRequest) -> None:
        request.finished = self.env.now
        self._leave_batch(request)
        request.done.succeed()

    def _leave_batch(self, request: EngineRequest) -> None:
        self._running -= 1
        self._kv_free += request.kv_tokens
        adapter = request.adapter
        if adapter is not None:
            left = self._batch_adapters[adapter] - 1
            if left:
                self._batch_adapters[adapter] = left
            else:
                del self._batch_adapters[adapter]

    # Adapters.

    def _load_s(self, adapter: Hashable) -> float:
        """How long the batch stands still for the load, by the tier that the adapter is in."""
        if adapter in self.gpu:
            return 0.0
        return self.latency.load_host_s if adapter in self.host else self.latency.load_disk_s

    def _install(self, load: _Load) -> None:
        if load.adapter not in self.gpu:
            self.counters.loads += 1
        self.gpu[load.adapter] = None
        self.gpu.move_to_end(load.adapter)
        self.host[load.adapter] = None
        self.host.move_to_end(load.adapter)
        if load.evict is not None:
            self.gpu.pop(load.evict, None)
        while len(self.host) > self.host_slots:
            oldest = next((adapter for adapter in self.host if adapter not in self.gpu), None)
            if oldest is None:  # all of them are in slots, until an eviction that is on its way
                break
            del self.host[oldest]
        load.done.succeed()
        self._changed()
