"""How far the simulator is from two real vLLM workers on this machine: `sim validate`, with its parts.

With `--calibrate FILE.json` the two workers are measured first, started as the router will start them:
a calibration of another machine, or of another day on a shared one, says nothing of the simulator.
The store holds copies of the given adapters, half again as many as two workers have slots.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.support import RESULTS, ROOT, free_port
from router.config import LLMConfig, load
from router.workers.devices import device_environment, this_machine
from sim.__main__ import main as sim
from sim.fleet import engine_model
from sim.latency import pairs_of
from sim.validate.workloads import CASES

CACHE: Final = ROOT / ".lorayard"
WORKERS: Final = 2
BOOT_TIMEOUT_S: Final = 600
LOAD: Final = 0.42  # of what the workers could do with batches of
BATCH: Final = 4
ENGINE_KWARGS: Final[dict[str, Any]] = {
    "enable_lora": True,
    "max_loras": 4,
    "max_lora_rank": 8,
    "max_model_len": 2048,
    "max_num_seqs": 32,
    "dtype": "bfloat16",
    "enforce_eager": True,
}


def main() -> int:
    """Prepare the store and the configuration, calibrate if asked to, then validate."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.validation",
        description=f"{__doc__} Further arguments go to `python -m sim validate`.",
    )
    top.add_argument("--calibration", default="cpu-smollm2-135m")
    top.add_argument("--calibrate", type=Path, metavar="FILE.json", help="measure it first")
    top.add_argument("--only-calibrate", action="store_true", help="and nothing else")
    top.add_argument("--quick", action="store_true", help="calibrate on fewer points")
    top.add_argument("--rounds", default="2", help="of --calibrate (default 2)")
    top.add_argument("--model", type=Path, default=CACHE / "smollm2-135m", metavar="FOLDER")
    top.add_argument("--model-id", default="smollm2-135m")
    top.add_argument("--accepted-base-model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    top.add_argument(
        "--adapters",
        type=Path,
        default=ROOT / "configs" / "demo-adapters",
        metavar="FOLDER",
        help="a folder of adapter folders",
    )
    top.add_argument("--longer", default="1", metavar="X", help="as of `sim validate`")
    top.add_argument("--rate", metavar="RPS", help="default: by the calibration")
    top.add_argument("--engine-kwargs", type=json.loads, default={}, metavar="JSON")
    top.add_argument("--report", type=Path, default=ROOT / "docs" / "validation.md")
    top.add_argument("--json", type=Path, default=RESULTS / "validation.json")
    arguments, others = top.parse_known_args()
    if not (arguments.model / "config.json").exists():
        raise SystemExit(
            "no demo model: run `python -m engine_worker.demo build .lorayard/smollm2-135m`"
        )
    arguments.engine_kwargs = {**ENGINE_KWARGS, **arguments.engine_kwargs}
    config = CACHE / f"validation-{arguments.model_id}.yaml"
    prepare(arguments, config)
    if arguments.calibrate is not None:
        calibrate(arguments, load(config).llm_configs[0])
        if arguments.only_calibrate:
            return 0
    llm = load(config).llm_configs[0]
    wanted = ["validate", "--config", os.path.relpath(config), "--longer", arguments.longer]
    wanted += ["--rate", arguments.rate or bearable_rate(llm, float(arguments.longer)), *others]
    files = ["--json", str(arguments.json), "--report", str(arguments.report)]
    sys.argv[1:] = wanted  # the command that the report shows
    return sim([*wanted, *files])


def bearable_rate(llm: LLMConfig, longer: float) -> str:
    """Requests a second under which queues are short and batches are not: see `LOAD`."""
    latency, _ = engine_model(llm)
    steady = CASES[0]
    tokens = round(steady.input_mean * longer)
    prompt_s = latency.step_s(
        running=1, adapters=1, tokens=tokens, pairs=pairs_of(0, tokens)
    ) - latency.step_s(running=1, adapters=1)
    step_s = latency.step_s(running=BATCH, adapters=BATCH, context=BATCH * tokens)
    request_s = prompt_s + steady.output_mean * longer * step_s / BATCH
    return f"{LOAD * WORKERS / request_s:.2g}"


def prepare(arguments: argparse.Namespace, config: Path) -> None:
    """Fill the store, and write the configuration of two workers."""
    slots = arguments.engine_kwargs["max_loras"]
    given = sorted(path for path in arguments.adapters.iterdir() if path.is_dir())
    store = CACHE / f"validation-{arguments.model_id}"
    shutil.rmtree(store, ignore_errors=True)
    for number in range(slots * WORKERS * 3 // 2):
        shutil.copytree(given[number % len(given)], store / f"adapter-{number:02d}")
    replicas = {"min_replicas": WORKERS, "max_replicas": WORKERS}
    calibration = arguments.calibration
    if arguments.calibrate is not None:
        # Until it is measured there is none to name.
        calibration = str(arguments.calibrate.resolve()) if arguments.calibrate.exists() else ""
    llm: dict[str, Any] = {
        "model_loading_config": {
            "model_id": arguments.model_id,
            "model_source": str(arguments.model.resolve()),
        },
        "lora_config": {
            "dynamic_lora_loading_path": str(store),
            "max_num_adapters_per_replica": slots,
            "accepted_base_models": [arguments.accepted_base_model],
        },
        "engine_kwargs": arguments.engine_kwargs,
        "deployment_config": {
            "max_ongoing_requests": arguments.engine_kwargs["max_num_seqs"],
            "autoscaling_config": replicas,
        },
    }
    if calibration:
        llm["calibration"] = calibration
    router = {
        "host": "127.0.0.1",
        "port": free_port(),
        "policy": "affinity",
        "queue_timeout_s": 600,
        "cache_dir": str(CACHE),
    }
    text = yaml.safe_dump({"llm_configs": [llm], "router": router}, sort_keys=False)
    config.write_text(f"# Written by benchmarks/validation.py.\n{text}", encoding="utf-8")


def calibrate(arguments: argparse.Namespace, llm: LLMConfig) -> None:
    """Measure one of two workers, the other one busy or not, into `--calibrate`."""
    adapter = next(path for path in sorted(arguments.adapters.iterdir()) if path.is_dir())
    with workers(arguments, llm) as (url, beside):
        shares_the_host = ("--beside", beside) if not this_machine([llm]).gpus else ()
        wanted = [
            *("calibrate", url, *shares_the_host, "--adapter", os.path.relpath(adapter)),
            *("--out", os.path.relpath(arguments.calibrate), "--rounds", arguments.rounds),
            *(("--quick",) if arguments.quick else ()),
        ]
        sys.argv[1:] = wanted  # the command that the calibration names
        status = sim(wanted)
    if status:
        raise SystemExit(status)
    prepare(arguments, CACHE / f"validation-{arguments.model_id}.yaml")


@contextlib.contextmanager
def workers(arguments: argparse.Namespace, llm: LLMConfig) -> Iterator[list[str]]:
    """Two engine workers on the devices that the router would give them; their URLs."""
    machine = this_machine([llm])
    ports = [free_port() for _ in range(WORKERS)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    started = []
    try:
        for number, port in enumerate(ports):
            with (CACHE / f"calibrate-{number}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        [
                            *(sys.executable, "-m", "engine_worker", "--port", str(port)),
                            *("--model", str(arguments.model), "--model-id", arguments.model_id),
                            *("--engine-kwargs", json.dumps(arguments.engine_kwargs)),
                        ],
                        env={**os.environ, **device_environment(llm, number, machine)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                )
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while not all(answers(url) for url in urls):
            if time.monotonic() > deadline or any(one.poll() is not None for one in started):
                raise SystemExit(f"the workers did not come up; see {CACHE}/calibrate-*.log")
            time.sleep(1)
        yield urls
    finally:
        for one in started:
            one.terminate()
        for one in started:
            try:
                one.wait(60)
            except subprocess.TimeoutExpired:
                one.kill()


def answers(url: str) -> bool:
    """Whether a worker is ready."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:  # noqa: S310  (loopback)
            return bool(answer.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
