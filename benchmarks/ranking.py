"""Whether policies rank on two real vLLM workers as the simulator says: the same requests for each.

The workers are started once; a router of each policy is attached to them in turn, round by round, so
that no policy has the quieter hour. Twice as many adapters as slots; requests come near to what the
workers can bear, so that where an adapter goes decides who waits. Each policy's recording is replayed
in the simulator under the same policy. Two policies rank as simulated where the better one by the mean
over all rounds is the same; where they differ by less than two rounds of one do, nothing is known.
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import aiohttp
import yaml

from benchmarks.support import RESULTS, ROOT, free_port, report, running
from benchmarks.validation import CACHE, ENGINE_KWARGS, WORKERS, workers
from router.config import Config, load
from sim.traces import TraceRow
from sim.validate.compare import figures
from sim.validate.drive import drive
from sim.validate.record import read_record
from sim.validate.simulate import simulate
from sim.validate.workloads import Case, rows

POLICIES: Final = ("cost", "affinity", "round_robin")
SLOTS: Final = 2
# The figure by which they are ranked: (group, name, whether more is better).
RANKED: Final = (
    ("ttft_s", "mean", False),
    ("e2e_s", "mean", False),
    ("adapters", "hits", True),
    ("adapters", "loads", False),
)
SEEDS: Final = 5
CASE: Final = Case("ranking", "twice as many adapters as slots", 1.0, 1.0, 2.0, 0.5, 96, 24)


def main() -> None:
    """Serve, simulate, compare, print."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.ranking", description=__doc__)
    top.add_argument("--rounds", type=int, default=2)
    top.add_argument("--requests", type=int, default=80, help="of each round and policy")
    top.add_argument("--rate", type=float, default=0.8, metavar="RPS")
    top.add_argument("--calibration", default="cpu-smollm2-135m")
    top.add_argument("--model", type=Path, default=CACHE / "smollm2-135m", metavar="FOLDER")
    top.add_argument("--engine-kwargs", type=json.loads, default={}, metavar="JSON")
    top.add_argument("--json", type=Path, default=RESULTS / "ranking.json", metavar="FILE")
    arguments = top.parse_args()
    if not (arguments.model / "config.json").exists():
        raise SystemExit(
            "no demo model: run `python -m engine_worker.demo build .lorayard/smollm2-135m`"
        )
    arguments.engine_kwargs = {**ENGINE_KWARGS, "max_loras": SLOTS, **arguments.engine_kwargs}
    arguments.model_id = "smollm2-135m"
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments, Path(folder))
    tell(results, arguments.json)


def measure(
    arguments: argparse.Namespace, folder: Path
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By policy: the figures of each real round, and of each simulation of it."""
    store = folder / "adapters"
    given = sorted(path for path in (ROOT / "configs" / "demo-adapters").iterdir() if path.is_dir())
    names = [f"adapter-{number:02d}" for number in range(round(CASE.adapters * SLOTS * WORKERS))]
    for number, name in enumerate(names):
        shutil.copytree(given[number % len(given)], store / name)
    configs = {policy: configured(arguments, folder, store, policy, []) for policy in POLICIES}
    found: dict[str, dict[str, list[dict[str, float]]]] = {
        policy: {"real": [], "simulated": []} for policy in POLICIES
    }
    llm = load(configs[POLICIES[0]]).llm_configs[0]
    with workers(arguments, llm) as urls:
        for number in range(arguments.rounds):
            made = rows(
                CASE,
                base=arguments.model_id,
                names=names,
                slots=SLOTS * WORKERS,
                rate=arguments.rate,
                requests=arguments.requests,
                seed=number,
            )
            # Another one first in each round.
            for policy in POLICIES[number % 3 :] + POLICIES[: number % 3]:
                print(f"round {number + 1}, {policy}", file=sys.stderr, flush=True)
                path = configured(arguments, folder, store, policy, urls)
                record = folder / f"{policy}-{number}.jsonl"
                serve(path, record, made, f"{policy}/{number}")
                one, simulated = figures_of(load(path), policy, record)
                found[policy]["real"].append(one)
                found[policy]["simulated"] += simulated
    return found


def configured(
    arguments: argparse.Namespace, folder: Path, store: Path, policy: str, urls: Sequence[str]
) -> Path:
    """Write the configuration of a router of that policy; without URLs, one for the workers."""
    llm: dict[str, Any] = {
        "model_loading_config": {
            "model_id": arguments.model_id,
            "model_source": str(arguments.model.resolve()),
        },
        "lora_config": {
            "dynamic_lora_loading_path": str(store),
            "max_num_adapters_per_replica": SLOTS,
            "accepted_base_models": ["HuggingFaceTB/SmolLM2-135M-Instruct"],
        },
        "engine_kwargs": arguments.engine_kwargs,
        "deployment_config": {
            "max_ongoing_requests": arguments.engine_kwargs["max_num_seqs"],
            "autoscaling_config": {"min_replicas": WORKERS, "max_replicas": WORKERS},
        },
        "calibration": arguments.calibration,
    }
    if urls:
        llm |= {"engine": "attached", "attach": list(urls)}
    router = {
        "host": "127.0.0.1",
        "port": free_port(),
        "policy": policy,
        "queue_timeout_s": 600,
        "cache_dir": str(folder / "cache"),
        "seed": 0,
    }
    path = folder / f"{policy}.yaml"
    path.write_text(yaml.safe_dump({"llm_configs": [llm], "router": router}), encoding="utf-8")
    return path


def serve(config: Path, record: Path, made: Sequence[TraceRow], label: str) -> None:
    """Run a router over the workers, send it the requests, and stop it: they are in `record`."""
    url = f"http://127.0.0.1:{load(config).router.port}"
    command = [sys.executable, "-m", "router", "serve", str(config), "--record", str(record)]

    async def sent() -> int:
        timeout = aiohttp.ClientTimeout(total=None, connect=10)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:
            return await drive(client, url, made, label, seed=label, progress=lambda: None)

    with running(command, f"{url}/ready", record.with_suffix(".log")):
        failed = asyncio.run(sent())
    if failed:
        raise SystemExit(f"{label}: {failed} requests were not answered")


def figures_of(
    config: Config, policy: str, record: Path
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The real figures of a recording, and those of its simulations, one a seed."""
    served = [one for one in read_record(record) if one.label]
    real = figures(served, 0)
    simulated = [
        figures(run.served, 0)
        for run in (simulate(config, served, policy, seed) for seed in range(SEEDS))
    ]
    return named(real), [named(one) for one in simulated]


def named(found: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """The figures that are ranked, by name."""
    return {f"{group} {name}": found[group, name] for group, name, _ in RANKED}


def order(means: Mapping[str, float], *, more_is_better: bool) -> list[str]:
    """The policies from best to worst."""
    return sorted(means, key=lambda policy: (-1 if more_is_better else 1) * means[policy])


def verdict(real: Mapping[str, float], simulated: Mapping[str, float], noise: float) -> str:
    """Of the pairs of policies, how many rank as simulated, and how many differ by noise alone."""
    same = unknown = other = 0
    for one, two in combinations(real, 2):
        if abs(real[one] - real[two]) <= noise:
            unknown += 1
        elif (real[one] < real[two]) == (simulated[one] < simulated[two]):
            same += 1
        else:
            other += 1
    return f"{same} as simulated, {other} not, {unknown} within noise"


def tell(found: Mapping[str, Mapping[str, list[dict[str, float]]]], path: Path) -> None:
    """The table: means, both orders, and whether the differences are more than noise."""
    lines = []
    data: dict[str, Any] = {"rounds": found, "orders": {}}
    for group, name, more in RANKED:
        key = f"{group} {name}"
        means = {
            side: {policy: fmean(one[key] for one in found[policy][side]) for policy in found}
            for side in ("real", "simulated")
        }
        orders = {side: order(means[side], more_is_better=more) for side in means}
        noise = fmean(
            abs(one[key] - other[key])
            for policy in found
            for one, other in combinations(found[policy]["real"], 2)
        ) if len(next(iter(found.values()))["real"]) > 1 else 0.0  # fmt: skip
        data["orders"][key] = {**orders, "means": means, "noise": noise}
        lines.append(
            (
                key,
                *(
                    f"{means['real'][policy]:.3g} / {means['simulated'][policy]:.3g}"
                    for policy in found
                ),
                f"{noise:.2g}",
                " < ".join(orders["real"]),
                verdict(means["real"], means["simulated"], noise),
            )
        )
    columns = ["real / simulated", *found, "noise", "best to worst", "as simulated?"]
    report("Policies on two real vLLM workers", columns, lines, path, data)


if __name__ == "__main__":
    main()
