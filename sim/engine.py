"""A continuous-batching engine: what vLLM v1's scheduler does, as events of a SimPy environment.

One step takes every running request one token further and spends what is left of the token budget
on prompts, in chunks, the running ones first (`Scheduler.schedule` of vLLM 0.32):
  - a running request that needs a KV block takes one; where none is left, the request admitted last is
    preempted: it loses its blocks, goes to the front of the queue and is computed again;
  - after a step without preemption, waiting requests are admitted in order while there is budget, a
    place among `max_num_seqs`, and memory for the whole prompt; one whose adapter would be one too many
    in the batch is passed by, however long it has waited;
  - what a request's prompt shares with a cached prefix under the same adapter is not computed again.
A load happens between two steps and stalls them all. Where a batch runs, its end is known one step
later: what was evicted is dropped, and the slots are read, by calls that wait for a boundary again. An
unload is such a call, and stalls nothing.

Steps in which nothing changes are taken as one event: a batch that only decodes goes on to its next
completion, to the last step that memory allows, or until an arrival, a load or an abort ends it at a
step's boundary. This is exact: times are whole picoseconds since the engine last began to work, and
`jump=False`, which takes every step by itself, gives the same moments to the last bit.

The engine knows only its environment: the simulator's virtual one, or one that is paced by the real
clock (the emulated engine of `engine_worker`). Not modelled: speculative decoding, pipeline stages,
several partial prefills at once, priorities inside the engine.
"""

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from enum import Enum, auto
from typing import Annotated, Any, Final, assert_never

import msgspec
import simpy

from sim.environment import Environment, Moment
from sim.host import PERMILLE, Host
from sim.kv import HASH_BLOCK_TOKENS, NONE, Holding, KVBlocks
from sim.latency import PICOSECOND, EngineDefaults, LatencyModel, pairs_of, picoseconds

Positive = Annotated[int, msgspec.Meta(ge=1)]


class EngineLimits(msgspec.Struct, frozen=True):
    """The engine arguments that the model knows, with vLLM's names.

    The defaults are vLLM's for a small accelerator; a calibration has those of its machine.
    """

    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive = 2048
    max_loras: Positive = 1
    max_cpu_loras: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_lora_rank: Positive = 16
    max_model_len: Positive = 131072
    block_size: Positive = 16
    num_gpu_blocks_override: Annotated[int, msgspec.Meta(ge=0)] = 0
    enable_prefix_caching: bool = True
    async_scheduling: bool = False


def engine_limits(arguments: Mapping[str, Any], defaults: EngineDefaults) -> EngineLimits:
    """The arguments of an engine that the model knows; the others do not change its timing.

    Raises `msgspec.ValidationError` where one is of a wrong kind.
    """
    given = msgspec.structs.asdict(defaults)
    given.update((name, value) for name, value in arguments.items() if value is not None)
    known = {name: given[name] for name in EngineLimits.__struct_fields__ if name in given}
    return msgspec.convert(known, EngineLimits)


class EngineRequest(Holding):
    """One request inside the engine, with the KV blocks that it holds.

    `on_done` is called when its last token is out, or on abort. `hash_ids` name the stretches of its
    prompt (see sim/kv.py). Times are virtual seconds.
    """

    __slots__ = (
        "aborted",
        "adapter",
        "computed",
        "end_tick",
        "finished",
        "first_token",
        "hash_ids",
        "join_tick",
        "on_done",
        "on_token",
        "order",
        "output_tokens",
        "preemptions",
        "prompt_tokens",
        "ready_step",
        "target",
    )

    def __init__(
        self,
        *,
        adapter: Hashable | None,
        prompt_tokens: int,
        output_tokens: int,
        hash_ids: tuple[int, ...] = (),
        on_token: Callable[[], None] | None = None,
        on_done: Callable[["EngineRequest"], None] | None = None,
    ) -> None:
        self.adapter = adapter
        self.prompt_tokens = prompt_tokens if prompt_tokens > 0 else 1
        self.output_tokens = output_tokens if output_tokens > 0 else 1
        self.hash_ids = hash_ids
        self.on_token = on_token
        self.on_done = on_done
        self.first_token: float | None = None
        self.finished: float | None = None
        self.aborted = False
        self.preemptions = 0
        self.target = self.prompt_tokens  # tokens to compute before the next one is sampled
        self.computed = 0  # of these, how many are
        self.segments = NONE
        self.shared = self.private = 0
        self.parked = None
        self.parked_at = 0
        self.order = 0
        self.ready_step = 0
        self.join_tick = -1  # the step after which it decodes; -1 while it does not
        self.end_tick = 0

    @property
    def ended(self) -> bool:
        """Whether it is finished or aborted."""
        return self.aborted or self.finished is not None


class EngineCounters(msgspec.Struct):
    """What an engine did in all. Times in seconds."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    busy_ps: int = 0
    stalled_ps: int = 0
    loads: int = 0
    running_peak: int = 0
    waiting_peak: int = 0

    @property
    def busy_s(self) -> float:
        """Seconds in steps."""
        return self.busy_ps * PICOSECOND

    @property
    def stalled_s(self) -> float:
        """Seconds in which a load held the batch up."""
        return self.stalled_ps * PICOSECOND


class _Load:
    __slots__ = ("adapter", "done", "evict")

    def __init__(self, adapter: Hashable, evict: Hashable | None, done: simpy.Event) -> None:
        self.adapter = adapter
        self.evict = evict
        self.done = done


class _Unload:
    __slots__ = ("adapter", "done")

    def __init__(self, adapter: Hashable, done: simpy.Event) -> None:
        self.adapter = adapter
        self.done = done


class _Doing(Enum):
    IDLE = auto()
    WAKING = auto()  # something has come; at the end of this moment the engine begins
    STEPPING = auto()
    LOADING = auto()


# By these names the inner loop has them at a tenth of the cost (Python 3.11).
IDLE: Final = _Doing.IDLE
WAKING: Final = _Doing.WAKING
STEPPING: Final = _Doing.STEPPING
LOADING: Final = _Doing.LOADING


class SimEngine:
    """One engine. `submit`, `abort`, `load` and `unload` are its interface; all return at once.

    `on_change` is called when what a worker reports may have changed: after its steps, as in vLLM,
    and when its adapters move. `jump` allows steps in which nothing changes to be taken as one event;
    it is off where every token must be seen in its time.
    """

    running: int  # requests in the batch

    def __init__(
        self,
        env: Environment,
        latency: LatencyModel,
        limits: EngineLimits,
        *,
        host: Host | None = None,
        segment_tokens: int = HASH_BLOCK_TOKENS,
        on_change: Callable[[], None] | None = None,
        jump: bool = True,
    ) -> None:
        self.env = env
        self._contention = round(latency.calibration.host_contention.value * PERMILLE)
        self._host = host if self._contention else None
        if self._host is not None:
            self._host.join(self)
        self.latency = latency
        self.limits = limits
        self.counters = EngineCounters()
        self.gpu: OrderedDict[Hashable, None] = OrderedDict()
        self.host: OrderedDict[Hashable, None] = OrderedDict()
        self.adapters_seq = 0  # rises with every change of the two
        self.host_slots: Final = max(limits.max_cpu_loras, limits.max_loras + 1)
        # Without a host tier of its own, what is evicted is removed to make the room.
        self._keeps_evicted: Final = self.host_slots > limits.max_loras + 1
        blocks = limits.num_gpu_blocks_override or latency.kv_tokens // limits.block_size
        self.kv = KVBlocks(
            max(1, blocks - 1),  # vLLM's first block is the null block, which holds nothing
            limits.block_size,
            caching=limits.enable_prefix_caching,
            segment_tokens=segment_tokens,
        )
        self._rank = env.next_rank()
        self._block_size: Final = limits.block_size
        self._on_change = on_change
        self._jump = jump
        self._waiting: deque[EngineRequest] = deque()
        self._decoding: list[tuple[int, int, EngineRequest]] = []  # a heap by the last tick
        self._grows = [0] * limits.block_size  # who decodes, by the tick at which a block is needed
        self._context = 0  # tokens that the decoding requests read in the coming step
        self._prefilling: list[EngineRequest] = []  # the last of them may take several steps
        self.running = 0
        self._batch_adapters: dict[Hashable, int] = {}
        self._loads: deque[_Load] = deque()
        self._unloads: list[_Unload] = []
        self._installed: list[_Load] = []  # in their slots; their callers do not know it yet
        self._aborted: list[EngineRequest] = []
        self._outputs: list[
            tuple[EngineRequest, bool]
        ] = []  # tokens not yet handed out; is it the last?
        self._doing = _Doing.IDLE
        self._due: Moment | None = None
        self._tick = 0  # steps taken
        self._order = 0
        # The span of steps under way: how many, what the first takes and each further one more, and
        # the chunks of prompts in it.
        self._since = 0.0
        self._elapsed_ps = 0
        self._span = 0
        self._span_ps = 0
        self._first_ps = 0
        self._rise_ps = 0
        self._launch_ps = 0  # what it takes to launch the first, where that is known
        self._chunks: list[tuple[EngineRequest, int]] = []

    # What a worker reports.

    @property
    def waiting(self) -> int:
        """Requests not yet admitted, or preempted."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that running requests hold, 0 to 1, as of the last boundary."""
        return 1.0 - self.kv.free / self.kv.total

    # What can be asked of it.

    def fits(self, request: EngineRequest) -> bool:
        """Whether it could ever be served: its length, and its memory at the end."""
        length = request.prompt_tokens + request.output_tokens
        # The last token is sampled and not stored.
        blocks = self.kv.blocks_for(length - 1)
        return length <= self.limits.max_model_len and blocks <= self.kv.total

    def submit(self, request: EngineRequest) -> None:
        """Queue a request, which fits."""
        counters = self.counters
        counters.requests += 1
        waiting = self._waiting
        # An engine that schedules asynchronously has already planned the step after this one.
        lag = 1 + self.limits.async_scheduling if self._doing is STEPPING else 0
        step = self._current_tick() + lag
        if waiting and waiting[-1].ready_step > step:
            step = waiting[-1].ready_step
        request.ready_step = step
        waiting.append(request)
        counters.waiting_peak = max(counters.waiting_peak, len(waiting))
        self._awaken(step)

    def abort(self, request: EngineRequest) -> None:
        """The client is gone: it leaves the batch at the next boundary. Harmless after its end."""
        if request.ended:
            return
        request.aborted = True
        if request in self._waiting:
            self._waiting.remove(request)
        else:
            self._aborted.append(request)
        # Whoever waits behind it may find room now.
        self._awaken(self._current_tick() + 1)
        if request.on_done is not None:
            request.on_done(request)

    def load(self, adapter: Hashable, evict: Hashable | None = None) -> simpy.Event:
        """Bring an adapter into a GPU slot, then drop `evict`; the event is its completion."""
        done = self.env.event()
        self._loads.append(_Load(adapter, evict, done))
        self._awaken(self._current_tick() + 1)
        return done

    def evict(self, adapter: Hashable) -> None:
        """Drop an adapter from its GPU slot; it stays in host memory for as long as that lasts."""
        self._drop(adapter)
        self.adapters_seq += 1
        self._changed()

    def unload(self, adapter: Hashable) -> simpy.Event:
        """Drop an adapter from its GPU slot and from host memory; the event is its completion."""
        done = self.env.event()
        self._unloads.append(_Unload(adapter, done))
        if self._doing is IDLE:
            self._drop_unloaded()
        else:
            self._awaken(self._current_tick() + 1)
        return done

    # Moments.

    def _steps_ps(self, steps: int) -> int:
        """How long the first `steps` of this span take: each takes `_rise_ps` more than the last."""
        return steps * self._first_ps + self._rise_ps * (steps * (steps - 1) // 2)

    def _end_span_after(self, steps: int) -> None:
        """Let this span have so many steps: the boundary planned before is void."""
        self._span = steps
        span_ps = self._first_ps if steps == 1 else self._steps_ps(steps)
        self._span_ps = span_ps
        moment = self._since + (self._elapsed_ps + span_ps) * PICOSECOND
        self._due = self.env.at(moment, self._reached, self._rank)

    def _awaken(self, tick: int) -> None:
        """Something has come that the step of that number is to see."""
        doing = self._doing
        if doing is STEPPING:
            steps = tick - self._tick
            if steps < self._span:
                self._end_span_after(steps)
        elif doing is IDLE:
            self._doing = WAKING
            self._due = self.env.at(self.env.now, self._reached, self._rank)
        elif doing is not WAKING and doing is not LOADING:
            assert_never(doing)

    def neighbour_changed(self) -> None:
        """Another engine of the host has begun or stopped: the next step takes another time."""
        if self._doing is STEPPING:
            self._awaken(self._current_tick() + 1)

    def _current_tick(self) -> int:
        """The number of the step that is under way now: the boundary before it has passed."""
        if self._doing is not STEPPING or self._span == 1:
            return self._tick
        return self._tick + self._whole_steps()

    def _whole_steps(self) -> int:
        """How many steps of this span have ended by now. Their last boundary may be this moment."""
        now = self.env.now
        # A boundary at this very moment has passed if one of a later rank was reached in it.
        passed_now = self.env.passed_at == now and self.env.passed_rank > self._rank
        left_ps = round((now - self._since) / PICOSECOND) - self._elapsed_ps
        first, rise = self._first_ps, self._rise_ps
        if rise:
            half = first / rise - 0.5
            steps = int(math.sqrt(half * half + 2 * max(0, left_ps) / rise) - half)
        else:
            steps = max(0, left_ps) // first
        steps = min(max(steps, 0), self._span - 1)
        # The estimate is rounded; the boundary that counts is the one that would be scheduled.
        while steps < self._span - 1 and self._has_passed(steps + 1, now, passed_now=passed_now):
            steps += 1
        while steps > 0 and not self._has_passed(steps, now, passed_now=passed_now):
            steps -= 1
        return steps

    def _has_passed(self, steps: int, now: float, *, passed_now: bool) -> bool:
        boundary = self._since + (self._elapsed_ps + self._steps_ps(steps)) * PICOSECOND
        return boundary < now or (boundary == now and passed_now)

    def _reached(self, boundary: Moment) -> None:
        """A boundary: end what was under way, then begin what is next."""
        if boundary is not self._due:  # planned before something came in between
            return
        env = self.env
        now = env.now
        if env.passed_at != now or env.passed_rank < self._rank:
            env.passed_at, env.passed_rank = now, self._rank
        doing, self._doing = self._doing, WAKING
        if doing is STEPPING:
            if self._installed:
                self._tell_installed()
            self._advance()
        elif doing is LOADING:
            self._install(self._loads.popleft())
        elif doing is WAKING:
            self._since = now
            self._elapsed_ps = 0
            if self._host is not None:
                self._host.changed(self, at_work=True)
        elif doing is IDLE:  # pragma: no cover  (nothing is due then)
            raise AssertionError("an idle engine has no boundary")
        else:
            assert_never(doing)
        self._begin()

    def _begin(self) -> None:
        """Begin the next load or the next span of steps, or fall idle."""
        if self._unloads:
            self._drop_unloaded()
        while self._loads:
            stall_ps = self._load_ps(self._loads[0].adapter)
            if stall_ps:
                self._doing = LOADING
                self._elapsed_ps += stall_ps
                self.counters.stalled_ps += stall_ps
                moment = self._since + self._elapsed_ps * PICOSECOND
                self._due = self.env.at(moment, self._reached, self._rank)
                self._hand_out_late()
                return
            self._install(self._loads.popleft())
        if self._aborted:
            self._drop_aborted()
        if not (self.running or self._waiting):
            self._tell_installed()
            self._doing = IDLE
            self._due = None
            if self._host is not None:
                self._host.changed(self, at_work=False)
            self._hand_out_late()
            return
        self._doing = STEPPING
        self._end_span_after(self._plan())
        if self._outputs:
            self._hand_out_late()

    # One step, and many.

    def _plan(self) -> int:
        """Decide what the next step computes; return for how many steps that stays so."""
        kv, limits = self.kv, self.limits
        chunks = self._chunks = []
        preempted = False
        decoding = len(self._decoding)
        budget = limits.max_num_batched_tokens - decoding
        growth = self._grows[self._tick % self._block_size]
        wanted = 0
        if self._prefilling:
            partial = self._prefilling[0]
            wanted = self._blocks_wanted(partial, min(budget, partial.target - partial.computed))
        if growth + wanted > kv.free:
            preempted = True
            self._preempt(budget)
            decoding = len(self._decoding)
            budget = limits.max_num_batched_tokens - decoding
        elif growth:
            kv.take(growth)
        stall_ps = tokens = pairs = self._launch_ps = 0
        if not self.running:  # nothing was planned ahead
            for request in self._waiting:
                request.ready_step = self._tick
        if self._prefilling:
            tokens, pairs = self._chunk(self._prefilling[0], budget)
        if self._waiting and not preempted and tokens < budget:
            more, more_pairs, stall_ps = self._admit(budget - tokens)
            tokens += more
            pairs += more_pairs
        running, adapters = self.running, len(self._batch_adapters)
        latency = self.latency
        requests_ps, context_ps = latency.decode_ps(running, adapters), latency.context_ps
        prompts_ps = 0
        if chunks:
            others_ps = requests_ps + context_ps * self._context
            prompts_ps = latency.prefill_ps(tokens, pairs, adapters, others_ps)
            self._launch_ps = latency.floor_ps(adapters) + stall_ps
        if self._host is not None:
            # Each term by itself: the time of a step stays linear in its context.
            slowdown = self._host.slowdown(self._contention)
            requests_ps = requests_ps * slowdown // PERMILLE
            context_ps = context_ps * slowdown // PERMILLE
            prompts_ps = prompts_ps * slowdown // PERMILLE
            self._launch_ps = self._launch_ps * slowdown // PERMILLE
        self._rise_ps = context_ps * decoding
        self._first_ps = requests_ps + context_ps * self._context + prompts_ps + stall_ps
        if chunks:
            return 1
        if preempted or self._installed or not self._jump:
            return 1
        return self._steps_ahead()

    def _steps_ahead(self) -> int:
        """For how many steps nothing changes: to the next completion, or while memory lasts."""
        steps = self._decoding[0][0] - self._tick
        # This step was planned too early for the last to come: the first one that may see them is not.
        for request in reversed(self._waiting):
            if request.ready_step <= self._tick:
                break
            steps = min(steps, request.ready_step - self._tick)
        size, free = self._block_size, self.kv.free
        # The first step's blocks are taken already.
        if len(self._decoding) * ((steps - 1) // size + 1) <= free:
            return steps
        if self._growth(self._tick + 1, steps - 1) <= free:
            return steps
        low, high = 1, steps  # memory lasts for `low` steps and not for `high`
        while high - low > 1:
            middle = (low + high) // 2
            if self._growth(self._tick + 1, middle - 1) <= free:
                low = middle
            else:
                high = middle
        return low

    def _growth(self, tick: int, steps: int) -> int:
        """Blocks that decoding takes in `steps` steps from `tick` on."""
        size, grows = self._block_size, self._grows
        rounds, rest = divmod(steps, size)
        blocks = rounds * len(self._decoding)
        if rest:
            start = tick % size
            blocks += sum(grows[start : start + rest])
            if start + rest > size:
                blocks += sum(grows[: start + rest - size])
        return blocks

    def _chunk(self, request: EngineRequest, budget: int) -> tuple[int, int]:
        """Spend budget on a prompt: its tokens and pairs in this step. Its blocks are there."""
        tokens = min(budget, request.target - request.computed)
        wanted = self._blocks_wanted(request, tokens)
        if wanted:
            self.kv.take(wanted)
            request.private += wanted
        self._chunks.append((request, tokens))
        end = request.computed + tokens
        if request.hash_ids and self.limits.enable_prefix_caching:
            self.kv.publish(
                request,
                request.adapter,
                request.hash_ids,
                request.computed,
                min(end, request.prompt_tokens),
            )
        return tokens, pairs_of(request.computed, tokens)

    def _blocks_wanted(self, request: EngineRequest, tokens: int) -> int:
        return self.kv.blocks_for(request.computed + tokens) - request.shared - request.private

    def _admit(self, budget: int) -> tuple[int, int, int]:
        """Admit waiting requests, in order, while there is room: their tokens, pairs and stall."""
        limits, kv, waiting, batch = self.limits, self.kv, self._waiting, self._batch_adapters
        passed: list[EngineRequest] = []
        tokens = pairs = stall_ps = 0
        while waiting and tokens < budget and self.running < limits.max_num_seqs:
            request = waiting[0]
            if request.ready_step > self._tick:
                break
            adapter = request.adapter
            if adapter is not None and adapter not in batch and len(batch) >= limits.max_loras:
                passed.append(waiting.popleft())
                continue
            wanted = kv.blocks_for(request.target)
            if request.hash_ids or request.parked is not None:
                found, shared, idle = kv.lookup(
                    request, adapter, request.hash_ids, request.prompt_tokens, request.target
                )
                if wanted - shared + idle > kv.free:
                    break
                request.parked = None
                if found:
                    kv.share(request, found)
                    request.computed = shared * limits.block_size
                    self.counters.cached_tokens += request.computed
            elif wanted > kv.free:
                break
            waiting.popleft()
            self.running += 1
            self._order += 1
            request.order = self._order
            if adapter is not None:
                stall_ps += self._activate(adapter)
                batch[adapter] = batch.get(adapter, 0) + 1
            self._prefilling.append(request)
            more, more_pairs = self._chunk(request, budget - tokens)
            tokens += more
            pairs += more_pairs
        if passed:
            waiting.extendleft(reversed(passed))
        self.counters.running_peak = max(self.counters.running_peak, self.running)
        return tokens, pairs, stall_ps

    def _advance(self) -> None:
        """The steps of this span have been taken: hand out their tokens."""
        counters, decoding, steps = self.counters, self._decoding, self._span
        self._elapsed_ps += self._span_ps
        if steps > 1 and (growth := self._growth(self._tick + 1, steps - 1)):
            self.kv.take(growth)
        self._tick += steps
        tick = self._tick
        counters.steps += steps
        counters.busy_ps += self._span_ps
        if decoding:
            count = len(decoding)
            counters.output_tokens += steps * count
            self._context += steps * count
            if not self._jump:
                for end_tick, _, request in sorted(decoding, key=lambda item: item[1]):
                    if end_tick > tick:
                        self._outputs.append((request, False))
            while decoding and decoding[0][0] <= tick:
                self._finish(heapq.heappop(decoding)[2])
        for request, tokens in self._chunks:
            counters.prompt_tokens += tokens
            request.computed += tokens
            if request.computed == request.target:
                self._sampled_first(request)
        if self._on_change is not None:
            self._on_change()
        if not self.limits.async_scheduling:
            self._hand_out(self._outputs)
            self._outputs = []

    def _hand_out(self, outputs: list[tuple[EngineRequest, bool]]) -> None:
        """Tokens reach those who wait for them."""
        now = self.env.now
        for request, last in outputs:
            if request.aborted:
                continue
            if request.first_token is None:
                request.first_token = now
            if request.on_token is not None:
                request.on_token()
            if last and not request.aborted:  # its last token may have ended it otherwise
                request.finished = now
                if request.on_done is not None:
                    request.on_done(request)

    def _hand_out_late(self) -> None:
        """An engine that schedules ahead looks at a step's tokens when it has launched the next one.

        That takes long where the next step has prompts and its kernels are launched one by one.
        """
        outputs, self._outputs = self._outputs, []
        if self._doing is STEPPING and self._launch_ps:
            moment = self._since + (self._elapsed_ps + self._launch_ps) * PICOSECOND
            self.env.at(moment, self._launched, value=outputs)
        else:
            self._hand_out(outputs)

    def _launched(self, moment: Moment) -> None:
        outputs: Any = moment.value
        self._hand_out(outputs)

    def _sampled_first(self, request: EngineRequest) -> None:
        """The prompt is computed, and one token sampled: from the next step on it decodes."""
        self._prefilling.remove(request)
        self.counters.output_tokens += 1
        generated = request.target - request.prompt_tokens + 1
        if generated == request.output_tokens:
            self._finish(request)
            return
        self._outputs.append((request, False))
        request.join_tick = self._tick
        request.end_tick = self._tick + request.output_tokens - generated
        heapq.heappush(self._decoding, (request.end_tick, request.order, request))
        self._grows[(self._tick - request.target) % self._block_size] += 1
        self._context += request.target + 1

    def _finish(self, request: EngineRequest) -> None:
        self._leave_batch(request)
        self._outputs.append((request, True))

    def _leave_batch(self, request: EngineRequest, *, park: bool = False) -> None:
        """Give back what it holds; it is in none of the lists any more."""
        self.running -= 1
        request.order = 0
        computed = request.computed
        if request.join_tick >= 0:
            decoded = self._tick - request.join_tick
            computed = request.target + decoded
            self._context -= computed + 1
            self._grows[(request.join_tick - request.target) % self._block_size] -= 1
            request.private = self.kv.blocks_for(computed) - request.shared
        self.kv.release(request, tokens=computed, park=park)
        adapter = request.adapter
        if adapter is not None:
            left = self._batch_adapters[adapter] - 1
            if left:
                self._batch_adapters[adapter] = left
            else:
                del self._batch_adapters[adapter]
                if adapter in self.gpu:
                    self.gpu.move_to_end(adapter)
                    self.host.move_to_end(adapter)

    def _preempt(self, budget: int) -> None:
        """Memory is short: serve the running in their order, at the cost of the last ones.

        The blocks of those who decode are taken here. A prompt under way is the last of the running,
        so it is the first to go.
        """
        kv, size, tick = self.kv, self._block_size, self._tick
        running = sorted((item[2] for item in self._decoding), key=lambda item: item.order)
        running.extend(self._prefilling)
        index = 0
        while index < len(running):
            request = running[index]
            if request.join_tick >= 0:
                need = int((request.join_tick - request.target - tick) % size == 0)
            else:
                need = self._blocks_wanted(request, min(budget, request.target - request.computed))
            while need > kv.free and index < len(running):
                self._send_back(running.pop())
            if index == len(running):
                break
            if request.join_tick >= 0:
                kv.take(need)
            index += 1

    def _send_back(self, request: EngineRequest) -> None:
        """Preempt: it will be computed again, with what it has generated so far."""
        if request.join_tick >= 0:
            self._decoding = [item for item in self._decoding if item[2] is not request]
            heapq.heapify(self._decoding)
        else:
            self._prefilling.remove(request)
        decoded = self._tick - request.join_tick if request.join_tick >= 0 else -1
        self._leave_batch(request, park=self.limits.enable_prefix_caching)
        request.target += decoded + 1
        request.join_tick = -1
        request.computed = 0
        request.preemptions += 1
        self.counters.preemptions += 1
        self._waiting.appendleft(request)

    def _drop_aborted(self) -> None:
        for request in self._aborted:
            if not request.order:  # it has left the batch by itself: preempted, or at its end
                if request in self._waiting:
                    self._waiting.remove(request)
            elif request.join_tick >= 0:
                self._decoding = [item for item in self._decoding if item[2] is not request]
                heapq.heapify(self._decoding)
                self._leave_batch(request)
            else:
                self._prefilling.remove(request)
                self._leave_batch(request)
        self._aborted.clear()
        self._changed()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change()

    # Adapters.

    def _load_ps(self, adapter: Hashable) -> int:
        """How long the batch stands still for the load, by the tier that the adapter is in."""
        if adapter in self.gpu:
            return 0
        latency = self.latency
        return picoseconds(latency.load_host_s if adapter in self.host else latency.load_disk_s)

    def _activate(self, adapter: Hashable) -> int:
        """A request is admitted: where its adapter is not in a slot, the step waits for it.

        The engine then drops the least recently used adapter that the batch does not use.
        """
        if adapter not in self.gpu:
            stall_ps = self._load_ps(adapter)
            self.counters.loads += 1
            self.counters.stalled_ps += stall_ps
            self.counters.busy_ps -= stall_ps
            self._bring(adapter)
            return stall_ps
        self.gpu.move_to_end(adapter)
        self.host.move_to_end(adapter)
        return 0

    def _bring(self, adapter: Hashable) -> None:
        """The adapter is in a slot now; who is one too many for its tier leaves it."""
        for tier in (self.gpu, self.host):
            tier[adapter] = None
            tier.move_to_end(adapter)
        batch = self._batch_adapters
        while len(self.gpu) > self.limits.max_loras:
            idle = (other for other in self.gpu if other != adapter and other not in batch)
            if (oldest := next(idle, None)) is None:
                break
            del self.gpu[oldest]
        while len(self.host) > self.host_slots:
            oldest = next((other for other in self.host if other not in self.gpu), None)
            if oldest is None:
                break
            del self.host[oldest]
        self.adapters_seq += 1

    def _install(self, load: _Load) -> None:
        if load.evict is not None:
            self._drop(load.evict)
        if load.adapter not in self.gpu:
            self.counters.loads += 1
        self._bring(load.adapter)
        if self.running:
            self._installed.append(load)
        else:
            load.done.succeed()
        self._changed()

    def _drop_unloaded(self) -> None:
        unloads, self._unloads = self._unloads, []
        for unload in unloads:
            self.gpu.pop(unload.adapter, None)
            self.host.pop(unload.adapter, None)
            self.adapters_seq += 1
            unload.done.succeed()
        self._changed()

    def _tell_installed(self) -> None:
        installed, self._installed = self._installed, []
        for load in installed:
            load.done.succeed()

    def _drop(self, adapter: Hashable) -> None:
        self.gpu.pop(adapter, None)
        if not self._keeps_evicted:
            self.host.pop(adapter, None)
