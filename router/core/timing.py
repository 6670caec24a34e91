"""How long an engine will take: a calibration's terms to begin with, corrected by what is observed.

The rule: predictions are used to compare workers and to tell what would miss its deadline, so they
are cheap and relative before they are exact. The formulas are those of sim/latency.py, less the
terms that are alike on all workers. Times in seconds.
"""

from enum import Enum
from typing import Final

import msgspec


class Tier(Enum):
    """Where an adapter is loaded from: a worker's host memory, the host's disk, or the store."""

    HOST = "host"
    DISK = "disk"
    STORE = "store"


class EngineTimes(msgspec.Struct, frozen=True):
    """An engine's times before anything was observed. The defaults are an 8B model's on an H100.

    `load_host_s` and `load_disk_s` hold the batch up; `fetch_s`, from the store to the host, does not.
    `kv_tokens` is how many tokens of context the engine's memory holds, 0 where that is not known.
    """

    step_base_s: float = 0.0105
    step_per_request_s: float = 4.4e-5
    kv_read_per_token_s: float = 3.9e-8
    prefill_per_token_s: float = 3.6e-5
    prefill_lora_factor: float = 1.0
    prefill_floor_s: float = 0.0
    lora_factor: float = 2.0
    lora_factor_per_adapter: float = 0.019
    load_host_s: float = 0.007
    load_disk_s: float = 0.09
    fetch_s: float = 0.12
    kv_tokens: int = 0

    def step_s(self, requests: int, adapters: int, context_tokens: float) -> float:
        """A step that decodes for `requests`, of `adapters` distinct adapters."""
        step_s = self.step_base_s + self.step_per_request_s * requests
        if adapters:
            step_s *= self.lora_factor + self.lora_factor_per_adapter * adapters
        return step_s + self.kv_read_per_token_s * context_tokens

    def prefill_s(self, tokens: int, *, lora: bool) -> float:
        """What a prompt adds to the steps that compute it."""
        return tokens * self.prefill_per_token_s * (self.prefill_lora_factor if lora else 1.0)


# Of an exponential mean: one observation moves it by so much.
GAIN: Final = 0.05
LOAD_GAIN: Final = 0.2
OUTPUT_TOKENS: Final = 200.0  # until answers were seen
PACE_MIN: Final = 0.25
PACE_MAX: Final = 16.0


class Learned:
    """What one fleet has shown so far. Begins with `times`; every observation moves it a little."""

    __slots__ = ("_first", "_load_s", "output_tokens", "times")

    def __init__(self, times: EngineTimes) -> None:
        self.times = times
        self.output_tokens = OUTPUT_TOKENS
        self._first = {
            Tier.HOST: times.load_host_s,
            Tier.DISK: times.load_disk_s,
            Tier.STORE: times.load_disk_s + times.fetch_s,
        }
        self._load_s = dict(self._first)

    def load_s(self, tier: Tier) -> float:
        """How long a load from a tier takes, from its decision until the adapter is resident."""
        return self._load_s[tier]

    def loaded(self, tier: Tier, load_s: float) -> None:
        """A load from a tier took so long."""
        self._load_s[tier] += LOAD_GAIN * (load_s - self._load_s[tier])

    def doubt(self) -> None:
        """A job was turned away by a prediction: who does so must not be right for ever.

        What is learned is learned of jobs that are let in, so each refusal moves it a little back to
        where it began, until one is let in and tells.
        """
        for tier, first_s in self._first.items():
            self._load_s[tier] += GAIN * (first_s - self._load_s[tier])

    def answered(self, output_tokens: int) -> None:
        """An answer had so many tokens."""
        self.output_tokens += GAIN * (output_tokens - self.output_tokens)

    def expected_output(self, max_output_tokens: int) -> float:
        """How long an answer will be: as long as they were on average, at most what is allowed."""
        if 0 < max_output_tokens < self.output_tokens:
            return float(max_output_tokens)
        return self.output_tokens


def new_pace(pace: float, predicted_s: float, observed_s: float) -> float:
    """A worker's pace, observed over predicted time of a step, moved by one more observation.

    Bounded, so that neither a cached answer nor a stall makes a worker look impossible.
    """
    if predicted_s <= 0.0 or observed_s <= 0.0:
        return pace
    ratio = min(max(observed_s / predicted_s, PACE_MIN), PACE_MAX)
    return pace + GAIN * (ratio - pace)
