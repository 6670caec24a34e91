"""What the router costs: requests a second and added latency against the engine directly, and CPU.

Both ways are driven in turn, round after round, and compared as ratios of their medians. The router
runs as in production: lease, admission, metrics. With `--engine emulated` the engine costs little, so
that the router's own cost shows; with `--engine vllm` a real engine sets the pace.
"""

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.support import (
    ROOT,
    chat,
    cpu_s,
    drive,
    free_port,
    parser,
    report,
    running,
    spread,
)

KWARGS: dict[str, dict[str, Any]] = {
    "emulated": {"max_num_seqs": 1024, "max_model_len": 8192},
    "vllm": {
        "max_model_len": 2048,
        "max_num_seqs": 32,
        "dtype": "bfloat16",
        "enforce_eager": True,
    },
}
MODEL = "bench"
# requests, tokens of each, clients, streamed
CASES: dict[str, list[tuple[str, int, int, int, bool]]] = {
    "emulated": [
        ("1 client, 1 token", 200, 1, 1, False),
        ("64 clients, 1 token", 2000, 1, 64, False),
        ("64 clients, 100 tokens, streamed", 128, 100, 64, True),
    ],
    "vllm": [
        ("1 client, 8 tokens", 10, 8, 1, False),
        ("16 clients, 16 tokens", 48, 16, 16, False),
        ("16 clients, 32 tokens, streamed", 32, 32, 16, True),
    ],
}


def main() -> None:
    """Run all cases in turn, print the table, write the file."""
    top = parser("router_overhead", __doc__.partition("\n")[0])
    top.add_argument("--engine", choices=sorted(KWARGS), default="emulated")
    top.add_argument("--model", default="bench", help="with --engine vllm: the model's folder")
    arguments = top.parse_args()
    if arguments.engine == "vllm" and arguments.json.stem == "router_overhead":
        arguments.json = arguments.json.with_name("router_overhead_vllm.json")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worker_url = f"http://127.0.0.1:{free_port()}"
        router_port = free_port()
        router_url = f"http://127.0.0.1:{router_port}"
        worker = [
            *(sys.executable, "-m", "engine_worker", "--engine", arguments.engine),
            *("--model", arguments.model, "--model-id", MODEL),
            *("--port", worker_url.rpartition(":")[2]),
            *("--engine-kwargs", json.dumps(KWARGS[arguments.engine])),
        ]
        config = folder / "config.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "llm_configs": [
                        {
                            "model_loading_config": {"model_id": MODEL},
                            "deployment_config": {"max_ongoing_requests": 1024},
                            "engine": "attached",
                            "attach": [worker_url],
                        }
                    ],
                    "router": {"port": router_port, "cache_dir": str(folder)},
                }
            )
        )
        router = [sys.executable, "-m", "router", "serve", str(config)]
        with (
            running(worker, f"{worker_url}/health", folder / "worker.log"),
            running(router, f"{router_url}/ready", folder / "router.log") as process,
        ):
            rows, data = measure(
                worker_url, router_url, process.pid, CASES[arguments.engine], arguments.rounds
            )
    report(
        f"The router against the {arguments.engine} engine directly, medians of "
        f"{arguments.rounds} rounds",
        ("case", "direct /s", "router /s", "ratio", "direct ms", "router ms", "CPU µs", "a chunk"),
        rows,
        arguments.json,
        data,
    )


def measure(
    worker_url: str,
    router_url: str,
    router_pid: int,
    cases: list[tuple[str, int, int, int, bool]],
    rounds: int,
) -> tuple[list[tuple[str, ...]], list[dict[str, Any]]]:
    """Drive both ways in turn; the table's rows and the figures."""
    rows: list[tuple[str, ...]] = []
    data: list[dict[str, Any]] = []
    for title, requests, tokens, clients, stream in cases:
        bodies = [chat(MODEL, tokens, stream=stream)] * requests
        asyncio.run(drive(worker_url, bodies[:clients], clients=clients))
        asyncio.run(drive(router_url, bodies[:clients], clients=clients))
        figures: dict[str, list[float]] = {
            name: [] for name in ("direct_per_s", "router_per_s", "direct_s", "router_s", "cpu_us")
        }
        chunk_us: list[float] = []
        for _ in range(rounds):
            direct = asyncio.run(drive(worker_url, bodies, clients=clients))
            before = cpu_s(router_pid)
            through = asyncio.run(drive(router_url, bodies, clients=clients))
            used_us = (cpu_s(router_pid) - before) * 1e6
            figures["direct_per_s"].append(direct.per_s)
            figures["router_per_s"].append(through.per_s)
            figures["direct_s"].append(direct.median_s)
            figures["router_s"].append(through.median_s)
            figures["cpu_us"].append(used_us / requests)
            if stream:
                chunk_us.append(used_us / (requests * tokens))
        found = {name: spread(values) for name, values in figures.items()}
        middle = {name: value["median"] for name, value in found.items()}
        ratio = middle["router_per_s"] / middle["direct_per_s"]
        rows.append(
            (
                title,
                f"{middle['direct_per_s']:,.1f}",
                f"{middle['router_per_s']:,.1f}",
                f"{ratio:.2f}",
                f"{middle['direct_s'] * 1000:.2f}",
                f"{middle['router_s'] * 1000:.2f}",
                f"{middle['cpu_us']:.0f}",
                f"{spread(chunk_us)['median']:.0f} µs" if chunk_us else "",
            )
        )
        data.append(
            {
                "case": title,
                **found,
                "throughput_ratio": ratio,
                "added_latency_s": middle["router_s"] - middle["direct_s"],
                **({"cpu_us_per_chunk": spread(chunk_us)} if chunk_us else {}),
            }
        )
    return rows, data


if __name__ == "__main__":
    assert ROOT.is_dir()
    main()
