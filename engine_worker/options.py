"""The command line of one worker, as data. Light on purpose: the guardian imports it too."""

from typing import Any, Literal, NamedTuple


class WorkerOptions(NamedTuple):
    """What one worker serves. `engine_kwargs` go to the engine as they are."""

    engine: Literal["vllm", "emulated"]
    model: str
    model_id: str
    engine_kwargs: dict[str, Any]
    calibration: str | None
    token: str | None
    drain_timeout_s: float
    max_ongoing_requests: int = 0
