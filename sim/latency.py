"""How long an engine takes: a calibration's coefficients, and the formulas that use them.

A calibration is a JSON file that says for each number where it comes from. The formulas are:

    step_s = (step_base_s + step_per_request_s × running) × lora
             + kv_read_per_token_s × context
             + (prefill_per_token_s × prefilled + prefill_per_pair_s × pairs) × prefill_lora
             and, with prompt tokens in it, at least prefill_floor_s × floor_lora
    lora   = 1 without an adapter in the batch, else
             lora_factor + lora_factor_per_adapter × adapters + lora_factor_per_rank × rank_max
    kv     = kv_tokens - slots × (kv_tokens_per_slot + kv_tokens_per_slot_and_rank × rank_max)
    load_s = the tier's own time at rank_max, by straight lines between the ranks measured

and all of a step times 1 + host_contention × the other engines at work on the same host.

`context` is the number of tokens whose keys and values the decoding requests read, `pairs` the
number of (prompt token, earlier token) pairs that prefill attends over, `adapters` the distinct ones
in the batch; `prefill_lora` and `floor_lora` are prefill_lora_factor and prefill_floor_lora_factor
where the batch has an adapter, and 1 where it has none. The floor is what it takes to launch a step's
kernels one by one: CUDA graphs save that where a step only decodes, and else the GPU waits for it. The
shape of `lora` and `kv` is that of the GPU LLM adapter digital twin (see the calibrations' sources).

Inside, a step's time is a whole number of picoseconds. Whole numbers add up the same in any order,
so many steps taken as one end at the same moment, to the last bit, as the same steps one by one.
"""

import difflib
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final

import msgspec

from router.core.timing import EngineTimes


class CalibrationError(Exception):
    """There is no such calibration, or it is not one. The message says what there is."""


class Coefficient(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number and where it comes from: measured, derived by a formula, or assumed.

    `interval` is its 95% confidence interval, where it was measured.
    """

    value: Annotated[float, msgspec.Meta(ge=0)]
    source: str
    interval: tuple[float, float] | None = None


class LoadTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds to load an adapter from one tier, by rank."""

    by_rank: Annotated[dict[int, Annotated[float, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)]
    source: str

    def at(self, rank: int) -> float:
        """The time at a rank: between two measured ranks linear, beyond them the nearest's."""
        ranks = sorted(self.by_rank)
        if rank <= ranks[0]:
            return self.by_rank[ranks[0]]
        for low, high in pairwise(ranks):
            if rank <= high:
                share = (rank - low) / (high - low)
                return self.by_rank[low] + share * (self.by_rank[high] - self.by_rank[low])
        return self.by_rank[ranks[-1]]


class EngineDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the engine uses where `engine_kwargs` is silent: it depends on the machine in vLLM."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    async_scheduling: bool
    source: str


class FitError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the coefficients are from what they were fitted to: medians of relative errors."""

    steps: float
    prompts: float


class Validated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `sim validate` found with it: the worst relative error over its workloads, by figure.

    `noise` is how far two real runs were from each other where that was.
    """

    date: str
    workloads: tuple[str, ...]
    errors: dict[str, float]
    noise: dict[str, float]


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The latency model of one engine, model and machine. Times in seconds, sizes in bytes."""

    name: str
    engine: str
    model: str
    machine: str
    date: str
    defaults: EngineDefaults
    request_overhead_s: Coefficient
    step_base_s: Coefficient
    step_per_request_s: Coefficient
    kv_read_per_token_s: Coefficient
    prefill_per_token_s: Coefficient
    prefill_per_pair_s: Coefficient
    prefill_lora_factor: Coefficient
    prefill_floor_s: Coefficient
    prefill_floor_lora_factor: Coefficient
    lora_factor: Coefficient
    lora_factor_per_adapter: Coefficient
    lora_factor_per_rank: Coefficient
    host_contention: Coefficient
    kv_tokens: Coefficient
    kv_tokens_per_slot: Coefficient
    kv_tokens_per_slot_and_rank: Coefficient
    adapter_bytes_per_rank: Coefficient
    store_bytes_per_s: Coefficient
    store_latency_s: Coefficient
    load_host_s: LoadTimes
    load_disk_s: LoadTimes
    fit_error: FitError | None = None
    validated: Validated | None = None

    @property
    def trust(self) -> str:
        """In words, how wrong a simulation with it may be."""
        if self.validated is not None:
            worst = ", ".join(
                f"{name} within {error:.1%}" for name, error in self.validated.errors.items()
            )
            return (
                f"against real workers on {self.validated.date}, the worst of "
                f"{len(self.validated.workloads)} workloads: {worst}"
            )
        if self.fit_error is not None:
            return (
                f"half of the measured steps are within {self.fit_error.steps:.1%} of it, of the "
                f"prompts within {self.fit_error.prompts:.1%}; not validated"
            )
        return "not measured here and not validated: see its sources"


PICOSECOND: Final = 1e-12
FOLDER: Final = resources.files("sim") / "calibrations"
DEFAULT: Final = "h100-llama-3.1-8b"


def shipped() -> list[str]:
    """The names of the calibrations that come with the package."""
    names = (entry.name for entry in FOLDER.iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def read_calibration(name: str) -> Calibration:
    """Read a shipped calibration by name, or a file by path. Raises `CalibrationError`."""
    try:
        if name.endswith(".json"):
            data = Path(name).read_bytes()
        else:
            data = (FOLDER / f"{name}.json").read_bytes()
    except OSError:
        close = difflib.get_close_matches(name, shipped(), n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"shipped: {', '.join(shipped())}"
        raise CalibrationError(
            f"no calibration `{name}`; {hint} (or the path of a .json file)"
        ) from None
    try:
        calibration = msgspec.json.decode(data, type=Calibration)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CalibrationError(f"{name}: not a calibration: {error}") from None
    for field in ("step_base_s", "store_bytes_per_s", "kv_tokens"):
        if getattr(calibration, field).value <= 0:
            raise CalibrationError(f"{name}: {field}: the value must be above 0")
    return calibration


class LatencyModel:
    """A calibration at work for one engine's settings: plain numbers, for the inner loop.

    `slots` is `max_loras`, `rank_max` is `max_lora_rank`: kernels and memory pay for the largest
    rank allowed, not for an adapter's own. Raises `CalibrationError` where no memory is left.
    """

    def __init__(self, calibration: Calibration, *, slots: int, rank_max: int) -> None:
        self.calibration = calibration
        self._base_s = calibration.step_base_s.value
        self._per_request_s = calibration.step_per_request_s.value
        self._lora = (
            calibration.lora_factor.value + calibration.lora_factor_per_rank.value * rank_max
        )
        self._lora_per_adapter = calibration.lora_factor_per_adapter.value
        self.context_ps = picoseconds(calibration.kv_read_per_token_s.value)
        self._per_token_s = calibration.prefill_per_token_s.value
        self._per_pair_s = calibration.prefill_per_pair_s.value
        self._prefill_lora = calibration.prefill_lora_factor.value
        self._floor_ps = picoseconds(calibration.prefill_floor_s.value)
        self._floor_lora_ps = picoseconds(
            calibration.prefill_floor_s.value * calibration.prefill_floor_lora_factor.value
        )
        self._decode: dict[tuple[int, int], int] = {}
        lost = slots * (
            calibration.kv_tokens_per_slot.value
            + calibration.kv_tokens_per_slot_and_rank.value * rank_max
        )
        self.kv_tokens = int(calibration.kv_tokens.value - lost)
        if self.kv_tokens <= 0:
            raise CalibrationError(
                f"{slots} slots of rank {rank_max} leave no memory for KV blocks in "
                f"{calibration.name}; use fewer slots or a lower max_lora_rank"
            )
        self.load_host_s = calibration.load_host_s.at(rank_max)
        self.load_disk_s = calibration.load_disk_s.at(rank_max)
        self.overhead_s = calibration.request_overhead_s.value
        self.fetch_s = (
            calibration.store_latency_s.value
            + calibration.adapter_bytes_per_rank.value
            * rank_max
            / calibration.store_bytes_per_s.value
        )

    def decode_ps(self, running: int, adapters: int) -> int:
        """The part of a step that its requests and adapters decide, in picoseconds."""
        known = self._decode.get((running, adapters))
        if known is None:
            step_s = self._base_s + self._per_request_s * running
            if adapters:
                step_s *= self._lora + self._lora_per_adapter * adapters
            known = self._decode[running, adapters] = picoseconds(step_s)
        return known

    def prefill_ps(self, tokens: int, pairs: int, adapters: int, others_ps: int) -> int:
        """What prompt tokens add to a step that takes `others_ps` without them, in picoseconds."""
        step_s = self._per_token_s * tokens + self._per_pair_s * pairs
        if adapters:
            step_s *= self._prefill_lora
        return max(picoseconds(step_s), self.floor_ps(adapters) - others_ps)

    def floor_ps(self, adapters: int) -> int:
        """The least that a step with prompt tokens takes, in picoseconds."""
        return self._floor_lora_ps if adapters else self._floor_ps

    def step_s(
        self, *, running: int, adapters: int = 0, context: int = 0, tokens: int = 0, pairs: int = 0
    ) -> float:
        """The time of one step, in seconds."""
        step_ps = self.decode_ps(running, adapters) + self.context_ps * context
        if tokens:
            step_ps += self.prefill_ps(tokens, pairs, adapters, step_ps)
        return PICOSECOND * step_ps


def engine_times(model: LatencyModel, rank_max: int) -> EngineTimes:
    """What the router expects of such an engine before it has observed any."""
    known = model.calibration
    return EngineTimes(
        step_base_s=known.step_base_s.value,
        step_per_request_s=known.step_per_request_s.value,
        kv_read_per_token_s=known.kv_read_per_token_s.value,
        prefill_per_token_s=known.prefill_per_token_s.value,
        prefill_lora_factor=known.prefill_lora_factor.value,
        prefill_floor_s=known.prefill_floor_s.value,
        lora_factor=known.lora_factor.value + known.lora_factor_per_rank.value * rank_max,
        lora_factor_per_adapter=known.lora_factor_per_adapter.value,
        load_host_s=model.load_host_s,
        load_disk_s=model.load_disk_s,
        fetch_s=model.fetch_s,
        kv_tokens=model.kv_tokens,
    )


def pairs_of(start: int, tokens: int) -> int:
    """How many (token, earlier token or itself) pairs a chunk of `tokens` after `start` attends."""
    return tokens * start + tokens * (tokens + 1) // 2


def picoseconds(seconds: float) -> int:
    """Seconds as a whole number of picoseconds."""
    return round(seconds / PICOSECOND)
