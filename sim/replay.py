"""Replay a trace: the production `Router` over simulated workers, in virtual time.

Each row becomes one `Job` at its time, takes a lease as the front end would, runs on the engine of
the worker that it was given, and leaves its latencies. The digest is a hash over every decision in
order: two runs with the same inputs give the same one, on any machine.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any, Final

import msgspec

from router.config import Config, LLMConfig
from router.core.fleet import Fleet, Worker
from router.core.job import AdapterRef, AdapterUse, Job, LoadError, Outcome, Prefix, Rejected
from router.core.lease import Lease
from router.core.placement import Decision, Policy
from router.core.policies import POLICIES
from router.core.ports import Observer
from router.core.prefixes import marks
from router.core.quotas import Quotas
from router.core.router import Router
from sim.engine import EngineRequest
from sim.environment import Environment, Moment
from sim.explain import Witness
from sim.fleet import Reports, SimWorkers
from sim.garbage import few_collections
from sim.host import Host
from sim.kv import HASH_BLOCK_TOKENS
from sim.latency import Calibration
from sim.loop import RanDryError, SimLoop
from sim.report.summary import Latencies, Slo, latency_figures, outcome_counts
from sim.report.timeline import Sampler
from sim.traces import TraceRow
from sim.workload import AdapterDraw

PROGRESS_EVERY: Final = 512
LINES_AT_ONCE: Final = 512
# By these names the inner loop has them at a tenth of the cost (Python 3.11).
HIT: Final = AdapterUse.HIT
JOINED: Final = AdapterUse.LOADING
# Between a worker's change and the router's knowing of it, on one network: a push over a connection
# that is open, and the two processes' wake-ups.
STALENESS_S: Final = 0.005
log = logging.getLogger("lorayard.sim")


class UnknownModelError(Exception):
    """A row asks for a base model that the configuration does not have."""


class Options(msgspec.Struct, frozen=True):
    """What a replay may vary. `speed` 2 lets requests come twice as fast as in the trace.

    `staleness_s` is how late the router hears of a worker's change, in seconds; `hash_block_tokens` how
    many tokens of a prompt one of the trace's hash ids stands for.
    """

    policy: str = "cost"
    seed: int = 0
    workers: int | None = None
    adapters: int = 0
    locality: float = 0.8
    zipf: float = 1.0
    speed: float = 1.0
    staleness_s: float = STALENESS_S
    hash_block_tokens: int = HASH_BLOCK_TOKENS
    slo: Slo = Slo()


class Ended(msgspec.Struct, frozen=True):
    """How one request ended, for a journal. `number` counts from 1, in order of arrival.

    Times are seconds, None where it was not answered; `evictions` is how many there were so far, in
    all. `worker` is empty where it had none.
    """

    number: int
    outcome: Outcome
    worker: str
    use: AdapterUse
    ttft_s: float | None
    e2e_s: float | None
    evictions: int


class _WorkerTally(msgspec.Struct):
    requests: int = 0
    hits: int = 0
    joins: int = 0
    cold_loads: int = 0
    failed_loads: int = 0
    evictions: int = 0
    in_flight_peak: int = 0


class _Ledger:
    """The observer: a hash over every decision, and what each worker was asked for."""

    reports: Reports

    def __init__(self, env: Environment, workers: Iterable[str]) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._unhashed: list[str] = []
        self._env = env
        self.tally = {worker: _WorkerTally() for worker in workers}

    def digest(self) -> bytes:
        """The hash over all lines so far."""
        self._hash.update("".join(self._unhashed).encode())
        self._unhashed.clear()
        return self._hash.digest()

    def _line(self, text: str) -> None:
        # Every bit of the time: it comes of additions and multiplications, alike on all machines.
        lines = self._unhashed
        lines.append(f"{self._env.now.hex()} {text}\n")
        if len(lines) == LINES_AT_ONCE:
            self.digest()

    @property
    def evictions(self) -> int:
        """How many there were so far."""
        return sum(tally.evictions for tally in self.tally.values())

    def rejected(self, job: Job, outcome: Outcome) -> None:
        self._line(f"{job.id} {outcome}")

    def decided(self, job: Job, decision: Decision, evicting: AdapterRef | None) -> None:
        worker = decision.worker
        assert worker is not None
        victim = evicting.name if evicting is not None else "-"
        self._line(f"{job.id} {worker.id} {decision.reason} {victim}")
        tally = self.tally[worker.id]
        tally.requests += 1
        tally.in_flight_peak = max(tally.in_flight_peak, worker.in_flight)

    def waits(self, job: Job, decision: Decision) -> None:  # noqa: ARG002
        self.reports.wake()

    def load_ended(
        self,
        worker: Worker,
        adapter: AdapterRef,
        load_s: float,  # noqa: ARG002
        error: LoadError | None,
    ) -> None:
        tally = self.tally[worker.id]
        if error is None:
            tally.cold_loads += 1
        else:
            tally.failed_loads += 1
        self._line(f"{worker.id} {adapter.name} {error is None}")

    def evicted(self, worker: Worker, adapter: AdapterRef) -> None:  # noqa: ARG002
        self.tally[worker.id].evictions += 1

    def fetch_ended(self, adapter: AdapterRef, fetch_s: float, error: LoadError | None) -> None:
        """Not a decision."""

    def unload_ended(
        self,
        worker: Worker,
        adapter: AdapterRef,
        error: LoadError | None,
    ) -> None:
        self._line(f"{worker.id} {adapter.name} leaves {error is None}")


class _Punctual(Policy):
    """A policy that has heard, when it decides, all reports that have arrived by then.

    While somebody waits they come by themselves, each in its time: they may let him be served.
    """

    reports: Reports
    router: Router

    def __init__(self, policy: Policy) -> None:
        self._place = policy.place
        self.arrived = policy.arrived  # type: ignore[method-assign]
        self.opens_at = policy.opens_at  # type: ignore[method-assign]
        self.has_memory = policy.has_memory  # type: ignore[method-assign]
        self.locality_tokens = policy.locality_tokens
        self.replicates = policy.replicates

    def place(self, job: Job, fleet: Fleet, now: float) -> Decision:
        if not self.router.queued:
            self.reports.due()
        return self._place(job, fleet, now)


class _Model:
    """One base model's router, workers and ledger."""

    def __init__(
        self,
        loop: SimLoop,
        llm: LLMConfig,
        config: Config,
        options: Options,
        host: Host,
        quotas: Quotas,
        witness: Witness | None,
    ) -> None:
        self.llm = llm
        self.workers = SimWorkers(
            loop,
            llm,
            options.workers or llm.replicas,
            options.hash_block_tokens,
            host,
            llm.eviction,
        )
        self.ledger = _Ledger(loop.env, self.workers.by_id)
        observer: Observer = self.ledger
        if witness is not None:
            observer = witness.watching(self.ledger, loop.time)
        rng = Random(f"placement:{options.seed}:{llm.model_id}")
        policy = _Punctual(POLICIES[options.policy](rng))
        self.router = Router(
            Fleet(llm.model_id, self.workers.times),
            policy,
            self.workers,
            max_queued=config.router.max_queued_requests,
            queue_timeout_s=config.router.queue_timeout_s,
            slot_patience_s=config.router.slot_patience_s,
            locality_tokens=config.router.locality_tokens,
            weights=config.router.weights,
            quotas=quotas,
            observer=observer,
        )
        policy.router = self.router
        policy.reports = self.ledger.reports = reports = Reports(
            loop.env, self.router, options.staleness_s
        )
        for one in self.workers.by_id.values():
            self.router.add_worker(one.worker)
            one.reports = reports

    def figures(self, worker_id: str, virtual_s: float) -> dict[str, Any]:
        """One row of `workers`."""
        counters = self.workers.by_id[worker_id].engine.counters
        return {
            "id": worker_id,
            **msgspec.structs.asdict(self.ledger.tally[worker_id]),
            "prompt_tokens": counters.prompt_tokens,
            "cached_tokens": counters.cached_tokens,
            "preemptions": counters.preemptions,
            "output_tokens": counters.output_tokens,
            "steps": counters.steps,
            "busy_s": counters.busy_s,
            "stalled_s": counters.stalled_s,
            "utilization": (counters.busy_s + counters.stalled_s) / virtual_s if virtual_s else 0.0,
            "running_peak": counters.running_peak,
            "waiting_peak": counters.waiting_peak,
        }


class Replay:
    """One run. `run` returns the result of the contract, less what only the caller can measure.

    `models` are the ids that the rows ask for, where they are known: they are looked up first.
    `witness` is told all that happens to one request.
    """

    def __init__(
        self,
        config: Config,
        rows: Iterable[TraceRow],
        options: Options,
        *,
        models: Iterable[str] = (),
        progress: Callable[[int], None] | None = None,
        sampler: Sampler | None = None,
        journal: Callable[[Ended], None] | None = None,
        witness: Witness | None = None,
    ) -> None:
        self._witness = witness
        self._journal = journal
        self._sampler = sampler
        self._known_models = tuple(models)
        self._deadline_s = config.router.ttft_deadline_s
        self._priorities = {tenant.name: tenant.priority for tenant in config.router.tenants}
        self._config = config
        self._rows = rows
        self._options = options
        self._progress = progress
        self._offered = 0
        self._under_way = 0  # rows that have come and not ended, and the next one
        self._over: asyncio.Future[None] | None = None
        self.latencies = Latencies()
        self._uses = dict.fromkeys(AdapterUse, 0)
        self._draw: AdapterDraw | None = None
        if options.adapters:
            self._draw = AdapterDraw(
                options.adapters,
                locality=options.locality,
                zipf=options.zipf,
                seed=options.seed,
            )
        self._refs: dict[str, tuple[_Model, AdapterRef | None]] = {}
        self._models: dict[str, _Model] = {}

    def run(self) -> dict[str, Any]:
        """Replay all rows to their end. Raises `UnknownModelError` and what the trace raises."""
        env = Environment()
        loop = SimLoop(env)  # type: ignore[abstract]  # sockets and processes are left out on purpose
        try:
            with few_collections():
                loop.run_until_complete(self._replay(loop))
        except RanDryError:
            # Who still waits is counted as unfinished; the caller sees that there are some.
            log.exception("requests wait for what will never happen")
        finally:
            for model in self._models.values():
                model.router.close()  # so that what an interrupt leaves behind begins nothing new
            loop.close()
        return self._result(float(env.now))

    async def _replay(self, loop: SimLoop) -> None:
        host = Host()  # of every model: they run on one machine
        quotas = Quotas(self._config.router.quotas, loop.time())
        for llm in self._config.llm_configs:
            self._models[llm.model_id] = _Model(
                loop, llm, self._config, self._options, host, quotas, self._witness
            )
        for model_id in self._known_models:
            self._find(model_id)
        if self._sampler is not None:
            routers = [model.router for model in self._models.values()]
            self._sampler.start(loop, routers, self._uses)
        rows: Iterator[TraceRow] = iter(self._rows)
        first = next(rows, None)
        if first is None:
            return
        origin_ms = first.timestamp
        per_ms = 1 / (1000 * self._options.speed)
        self._over = over = loop.create_future()

        def arrive(now: Moment) -> None:
            row = now.value
            assert isinstance(row, TraceRow)
            # Held by what it waits for: the loop, the router or the engine.
            asyncio.Task(self._one(loop, row), loop=loop)
            if (row := next(rows, None)) is not None:
                self._under_way += 1
                moment = (row.timestamp - origin_ms) * per_ms
                loop.env.at(max(moment, loop.env.now), arrive, value=row)

        self._under_way = 1
        loop.env.at(loop.env.now, arrive, value=first)
        await over
        if self._progress is not None:
            self._progress(self.latencies.ended)

    def _resolve(self, row: TraceRow) -> tuple[_Model, AdapterRef | None]:
        """The model's fleet and the adapter that a row asks for. The trace is the catalog."""
        model_id = row.model
        if model_id is None or (self._draw is not None and ":" not in model_id):
            base = model_id or self._config.llm_configs[0].model_id
            model_id = f"{base}:{self._draw.next()}" if self._draw is not None else base
        known = self._refs.get(model_id)
        if known is None:
            known = self._refs[model_id] = self._find(model_id)
        return known

    def _find(self, model_id: str) -> tuple[_Model, AdapterRef | None]:
        base, _, name = model_id.partition(":")
        model = self._models.get(base)
        if model is None:
            if len(self._models) > 1:
                raise UnknownModelError(
                    f"the trace asks for `{model_id}`, but the configuration has only "
                    f"{', '.join(sorted(self._models))}; add the model, or leave one model in it"
                )
            model = next(iter(self._models.values()))
        if name and not model.llm.slots:
            raise UnknownModelError(
                f"the trace asks for the adapter `{model_id}`, but `{model.llm.model_id}` has no "
                "lora_config; add one, or use a trace without adapters"
            )
        return model, AdapterRef(base, name) if name else None

    def _prefix(self, row: TraceRow) -> tuple[Prefix, ...]:
        """The marks of a prompt: a trace's hash id stands for a stretch and all before it."""
        ids = row.hash_ids
        if not ids:
            return ()
        width = self._options.hash_block_tokens
        return tuple(Prefix(ids[mark - 1], mark * width) for mark in marks(len(ids)))

    def _job(self, row: TraceRow, number: int, adapter: AdapterRef | None, arrived: float) -> Job:
        job = Job(
            str(number),
            adapter,
            prompt_tokens=row.input_length,
            tenant=row.tenant,
            priority=row.priority or self._priorities.get(row.tenant, 0),
            deadline=None if self._deadline_s is None else arrived + self._deadline_s,
            prefix=self._prefix(row),
        )
        if self._witness is not None:
            self._witness.came(job, arrived)
        return job

    async def _one(self, loop: SimLoop, row: TraceRow) -> None:
        """One request, from its arrival to its end."""
        arrived = loop.time()
        self._offered += 1
        number = self._offered
        try:
            model, adapter = self._resolve(row)
            job = self._job(row, number, adapter, arrived)
            async with model.router.lease(job) as lease:
                worker, use = lease.worker, lease.use
                self._leased(model, lease)
                done: asyncio.Future[EngineRequest] = loop.create_future()
                request = EngineRequest(
                    adapter=adapter,
                    prompt_tokens=row.input_length,
                    output_tokens=row.output_length,
                    hash_ids=row.hash_ids,
                    on_done=done.set_result,
                    on_token=lease.first_token,  # the first and the last are told
                )
                engine = model.workers.by_id[worker.id].engine
                if overhead_s := model.workers.latency.overhead_s:
                    await asyncio.sleep(overhead_s)
                if fits := engine.fits(request):
                    engine.submit(request)
                    await done
                    lease.answered(request.output_tokens)
            if fits:
                assert request.first_token is not None
                ttft_s, e2e_s = request.first_token - arrived, loop.time() - arrived
                self.latencies.answered(
                    ttft_s=ttft_s,
                    e2e_s=e2e_s,
                    tokens=request.output_tokens,
                    slo=self._options.slo,
                )
                if self._journal is not None or self._witness is not None:
                    evictions = model.ledger.evictions
                    self._told(
                        Ended(number, Outcome.COMPLETED, worker.id, use, ttft_s, e2e_s, evictions),
                        f"{request.output_tokens:,} tokens",
                        loop.time(),
                    )
            else:
                self._lost(number, Outcome.REFUSED, "it is too long for the engine", loop.time())
        except Rejected as rejected:
            model.ledger.rejected(job, rejected.outcome)
            self._lost(number, rejected.outcome, str(rejected), loop.time())
        except LoadError as error:
            self._lost(number, Outcome.LOAD_FAILED, str(error), loop.time())
        except Exception as error:  # noqa: BLE001  (a fault of the program: it ends the replay)
            self._ended(error)
            return
        self._ended(None)

    def _leased(self, model: _Model, lease: Lease) -> None:
        use = lease.use
        self._uses[use] += 1
        tally = model.ledger.tally[lease.worker.id]
        if use is HIT:
            tally.hits += 1
        elif use is JOINED:
            tally.joins += 1
        if self._witness is not None:
            self._witness.leased(lease)

    def _lost(self, number: int, outcome: Outcome, why: str, now: float) -> None:
        self.latencies.lost(outcome)
        if self._journal is not None or self._witness is not None:
            evictions = sum(model.ledger.evictions for model in self._models.values())
            ended = Ended(number, outcome, "", AdapterUse.NONE, None, None, evictions)
            self._told(ended, why, now)

    def _told(self, ended: Ended, what: str, now: float) -> None:
        if self._journal is not None:
            self._journal(ended)
        if self._witness is not None:
            self._witness.ended(ended, what, now)

    def _ended(self, error: Exception | None) -> None:
        self._under_way -= 1
        over, ended = self._over, self.latencies.ended
        assert over is not None
        if over.done():
            return
        if error is not None:
            over.set_exception(error)
        elif not self._under_way:
            over.set_result(None)
        if self._progress is not None and ended % PROGRESS_EVERY == 0:
            self._progress(ended)

    def _result(self, virtual_s: float) -> dict[str, Any]:
        options, latencies, offered = self._options, self.latencies, self._offered
        digest = hashlib.blake2b(digest_size=16)
        tallies: list[_WorkerTally] = []
        workers: list[dict[str, Any]] = []
        for model in self._models.values():
            digest.update(model.ledger.digest())
            tallies.extend(model.ledger.tally.values())
            workers.extend(model.figures(worker, virtual_s) for worker in model.workers.by_id)
        placed = sum(count for use, count in self._uses.items() if use is not AdapterUse.NONE)
        hits = self._uses[AdapterUse.HIT]
        return {
            "policy": options.policy,
            "seed": options.seed,
            **outcome_counts(latencies, offered),
            "outcomes": {name.value: count for name, count in latencies.outcomes.items() if count},
            **latency_figures(latencies, offered),
            "adapters": {
                "hits": hits,
                "joins": self._uses[AdapterUse.LOADING],
                "cold_loads": sum(tally.cold_loads for tally in tallies),
                "evictions": sum(tally.evictions for tally in tallies),
                "hit_rate": hits / placed if placed else None,
            },
            "goodput_rps": latencies.good / virtual_s if virtual_s else 0.0,
            "slo": {
                "ttft_s": options.slo.ttft_s,
                "itl_s": options.slo.itl_s,
                "attainment": latencies.good / offered if offered else 0.0,
            },
            "workers": workers,
            "calibrations": {
                name: _calibration_figures(model.workers.latency.calibration)
                for name, model in self._models.items()
            },
            "sim": {"virtual_s": virtual_s},
            "digest": digest.hexdigest(),
        }


def _calibration_figures(calibration: Calibration) -> dict[str, Any]:
    """What the latencies rest on, and how wrong they may be."""
    validated = calibration.validated
    return {
        "name": calibration.name,
        "engine": calibration.engine,
        "machine": calibration.machine,
        "date": calibration.date,
        "errors": validated.errors if validated else None,
        "trust": calibration.trust,
    }
