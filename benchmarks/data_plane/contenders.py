"""What stands between the clients and the engines: a command, and where it says that it is ready.

This router has all its features on: policy `cost`, adapters, pushed state, metrics, and the recording.
What the peers run with is in `peers`.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import yaml

from benchmarks.data_plane.wire import ADAPTERS, BASE, MODELS
from benchmarks.support import ROOT

DEMO_ADAPTERS: Final = ROOT / "configs" / "demo-adapters"
DEMO_BASE: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_RANK: Final = 8
ONGOING_MAX: Final = 4096
QUEUED_MAX: Final = 16384


class Launch(msgspec.Struct, frozen=True):
    """How to start a router, and the path that gives 200 when it can serve."""

    command: Sequence[str]
    ready: str


class Contender(msgspec.Struct, frozen=True):
    """A router. `launch` takes the engines' ports, its own port and a folder for its files.

    `models` are the ids that it is asked for.
    """

    name: str
    version: str
    launch: Callable[[Sequence[int], int, Path], Launch]
    models: tuple[str, ...] = MODELS


class Absent(Exception):  # noqa: N818  (it is no fault)
    """A contender cannot be had on this machine; the message says why."""


DIRECT: Final = "direct"


def lorayard() -> Contender:
    """This router, as it is in this working tree."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    return Contender("lorayard", said.stdout.strip() or "this tree", _launch_lorayard)


def _launch_lorayard(engines: Sequence[int], port: int, folder: Path) -> Launch:
    store = folder / "adapters"
    if not store.exists():
        given = sorted(path for path in DEMO_ADAPTERS.iterdir() if path.is_dir())
        for number, name in enumerate(ADAPTERS):
            shutil.copytree(given[number % len(given)], store / name)
    config = folder / "lorayard.yaml"
    config.write_text(yaml.safe_dump(lorayard_config(engines, port, folder, store)))
    serve = [sys.executable, "-m", "router", "serve", str(config)]
    record = ["--record", str(folder / "traffic.jsonl")]
    return Launch([*serve, *record], "/ready")


def lorayard_config(
    engines: Sequence[int], port: int, folder: Path, store: Path
) -> dict[str, object]:
    """Its configuration."""
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": BASE},
                "lora_config": {
                    "dynamic_lora_loading_path": str(store),
                    "max_num_adapters_per_replica": len(ADAPTERS),
                    "accepted_base_models": [DEMO_BASE],
                },
                "engine_kwargs": {"max_lora_rank": DEMO_RANK},
                "deployment_config": {"max_ongoing_requests": ONGOING_MAX},
                "engine": "attached",
                "attach": [f"http://127.0.0.1:{engine}" for engine in engines],
            }
        ],
        "router": {
            "port": port,
            "max_queued_requests": QUEUED_MAX,
            "cache_dir": str(folder / "cache"),
        },
    }
