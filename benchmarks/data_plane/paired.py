"""Real engines: throughput through the router against the same engines driven directly, in pairs.

Two engines on few cores are noisy, and drift. So both ways are driven in many short rounds, one right
after the other and every other time in the other order, and only the ratio within a pair counts: its
median, and the interval that the median of such pairs lies in with 95%, from their order alone.

Clients are spread over the engines evenly when there is no router between. No process is pinned.
"""

import asyncio
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import comb
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import yaml

from benchmarks.data_plane.processes import Cores, started, wait_for
from benchmarks.data_plane.wire import BASE
from benchmarks.support import chat, free_port

ENGINES: Final = 2
CLIENTS: Final = 16
BOOT_S: Final = 900.0
THROUGHPUT_GOAL: Final = 0.97
CONFIDENCE: Final = 0.95
KWARGS: Final[dict[str, dict[str, Any]]] = {
    "emulated": {"max_num_seqs": 1024, "max_model_len": 8192},
    "vllm": {
        "max_model_len": 2048,
        "max_num_seqs": 32,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
    },
}


class Paired(msgspec.Struct, frozen=True, kw_only=True):
    """Requests a second of each pair, and what the ratio is."""

    engine: str
    tokens: int
    direct_per_s: list[float]
    router_per_s: list[float]
    ratio: float
    least: float
    most: float
    ray_serve: str

    @property
    def ratios(self) -> list[float]:
        """Of each pair."""
        pairs = zip(self.router_per_s, self.direct_per_s, strict=True)
        return [router / direct for router, direct in pairs]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of what these were drawn from lies with 95%: the sign test's interval.

    All of the values' range where they are too few to say.
    """
    ranked = sorted(values)
    count = len(ranked)
    cut = 0
    below = comb(count, 0) / 2**count
    while below <= (1 - CONFIDENCE) / 2 and cut < count // 2:
        cut += 1
        below += comb(count, cut) / 2**count
    cut = max(0, cut - 1)
    return ranked[cut], ranked[count - 1 - cut]


def measure(
    engine: str,
    model: str,
    *,
    pairs: int,
    requests: int,
    tokens: int,
    folder: Path,
    say: Callable[[str], None],
) -> Paired:
    """Boot engines and a router, and drive both ways, `requests` a round."""
    everywhere = Cores.of_this_machine()
    cores = everywhere.router | everywhere.others
    with ExitStack() as stack:
        ports = [free_port() for _ in range(ENGINES)]
        booting = []
        for number, port in enumerate(ports):
            command = [
                *(sys.executable, "-m", "engine_worker", "--engine", engine),
                *("--model", model, "--model-id", BASE, "--port", str(port)),
                *("--engine-kwargs", json.dumps(KWARGS[engine])),
            ]
            log = folder / f"engine-{number}.log"
            booting.append((port, stack.enter_context(started(command, cores, log)), log))
        say(f"booting {ENGINES} {engine} engines")
        for port, process, log in booting:
            wait_for(f"http://127.0.0.1:{port}/health", process, log, BOOT_S)
        router_port = free_port()
        config = folder / "lorayard.yaml"
        config.write_text(yaml.safe_dump(_config(ports, router_port, folder)))
        serve = [sys.executable, "-m", "router", "serve", str(config)]
        record = ["--record", str(folder / "traffic.jsonl")]
        log = folder / "lorayard.log"
        process = stack.enter_context(started([*serve, *record], cores, log))
        router = f"http://127.0.0.1:{router_port}"
        wait_for(f"{router}/ready", process, log)
        direct = [f"http://127.0.0.1:{port}" for port in ports]
        body = msgspec.json.encode(chat(BASE, tokens))
        found: dict[str, list[float]] = {"direct": [], "router": []}
        for urls in (direct, [router]):
            asyncio.run(drive(urls, body, CLIENTS))
        for number in range(pairs):
            ways = [("direct", direct), ("router", [router])]
            for name, urls in reversed(ways) if number % 2 else ways:
                wall_s = asyncio.run(drive(urls, body, requests))
                found[name].append(requests / wall_s)
            say(f"pair {number + 1} of {pairs}: {found['router'][-1] / found['direct'][-1]:.3f}")
    ratios = [one / other for one, other in zip(found["router"], found["direct"], strict=True)]
    least, most = interval(ratios)
    return Paired(
        engine=engine,
        tokens=tokens,
        direct_per_s=found["direct"],
        router_per_s=found["router"],
        ratio=statistics.median(ratios),
        least=least,
        most=most,
        ray_serve=ray_serve(),
    )


def ray_serve() -> str:
    """What can be said of Ray Serve LLM on this machine."""
    try:
        there = importlib.util.find_spec("ray.serve.llm") is not None
    except ModuleNotFoundError:
        there = False
    if there:
        return "installed here, and not driven by this benchmark"
    return "left out: not installed here (no module ray.serve.llm)"


async def drive(urls: Sequence[str], body: bytes, requests: int) -> float:
    """Send requests from `CLIENTS` clients, each to one of the URLs; the seconds that all took."""
    waiting = iter(range(requests))
    headers = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def client(url: str) -> None:
            for _ in waiting:
                async with session.post(f"{url}/v1/chat/completions", data=body) as answer:
                    text = await answer.read()
                    if answer.status != 200:
                        raise SystemExit(f"{url}: {answer.status}: {text[:300]!r}")

        begun = time.perf_counter()
        clients = itertools.islice(itertools.cycle(urls), CLIENTS)
        await asyncio.gather(*(client(url) for url in clients))
        return time.perf_counter() - begun


def _config(engines: Sequence[int], port: int, folder: Path) -> dict[str, Any]:
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": BASE},
                "deployment_config": {"max_ongoing_requests": 64},
                "engine": "attached",
                "attach": [f"http://127.0.0.1:{engine}" for engine in engines],
            }
        ],
        "router": {"port": port, "cache_dir": str(folder / "cache")},
    }
