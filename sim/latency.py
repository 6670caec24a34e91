"""How long an engine takes: a calibration's coefficients, and the formulas that use them.

A calibration is a JSON file that says for each number where it comes from. The formulas are:

    step_s  = (step_base_s + step_per_request_s × running) × lora + prefill_per_token_s × prefilled
    lora    = 1 without an adapter in the batch, else lora_factor + lora_factor_per_adapter × adapters
    kv      = kv_tokens - slots × (kv_tokens_per_slot + kv_tokens_per_slot_and_rank × rank_max)
    load_s  = the tier's own time at rank_max, by straight lines between the ranks measured

The shape of the first and third is that of the GPU LLM adapter digital twin (see the calibrations'
sources); the token term is what a compute-bound prefill adds.
"""

import difflib
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final

import msgspec


class CalibrationError(Exception):
    """There is no such calibration, or it is not one. The message says what there is."""


class Coefficient(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number and where it comes from: measured, derived by a formula, or assumed."""

    value: Annotated[float, msgspec.Meta(ge=0)]
    source: str


class LoadTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds to load an adapter from one tier, by rank."""

    by_rank: Annotated[dict[int, float], msgspec.Meta(min_length=1)]
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


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The latency model of one engine, model and machine. Times in seconds, sizes in bytes."""

    name: str
    engine: str
    model: str
    machine: str
    date: str
    step_base_s: Coefficient
    step_per_request_s: Coefficient
    prefill_per_token_s: Coefficient
    lora_factor: Coefficient
    lora_factor_per_adapter: Coefficient
    kv_tokens: Coefficient
    kv_tokens_per_slot: Coefficient
    kv_tokens_per_slot_and_rank: Coefficient
    adapter_bytes_per_rank: Coefficient
    store_bytes_per_s: Coefficient
    store_latency_s: Coefficient
    load_host_s: LoadTimes
    load_disk_s: LoadTimes


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
    """A calibration at work for one engine's settings: plain floats, for the inner loop.

    `slots` is `max_loras`, `rank_max` is `max_lora_rank`: kernels and memory pay for the largest
    rank allowed, not for an adapter's own.
    """

    def __init__(self, calibration: Calibration, *, slots: int, rank_max: int) -> None:
        self.calibration = calibration
        self._base_s = calibration.step_base_s.value
        self._per_request_s = calibration.step_per_request_s.value
        self._per_token_s = calibration.prefill_per_token_s.value
        self._lora = calibration.lora_factor.value
        self._lora_per_adapter = calibration.lora_factor_per_adapter.value
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
        self.fetch_s = (
            calibration.store_latency_s.value
            + calibration.adapter_bytes_per_rank.value
            * rank_max
            / calibration.store_bytes_per_s.value
        )

    def step_s(self, running: int, prefilled: int, adapters: int) -> float:
        """The time of one step: requests in the batch, prompt tokens computed, distinct adapters."""
        decode_s = self._base_s + self._per_request_s * running
        if adapters:
            decode_s *= self._lora + self._lora_per_adapter * adapters
        return decode_s + self._per_token_s * prefilled
