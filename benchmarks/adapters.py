"""What adapters cost: a cold one until its first token, and ten thousand of them in the store.

  cold  the first request for an adapter, from an S3 server on this machine to its first token, and what
        of that is the fetch, the load into the engine, and the rest: the lookup of its name, the queue,
        the engine's first token, the router. `queued` asks while every place of the workers is taken,
        beside a request for the base model that shows the queue alone: the fetch goes on meanwhile, so
        the whole is less than the parts and the queue together.
  many  how long `router serve` takes to be ready, how much memory its process has, and how long
        `GET /v1/models` takes, with few and with many adapters in a folder.

Real processes over HTTP; the engine is the emulated one, or vLLM (`--engine vllm --model FOLDER`).
"""

import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import boto3
import msgspec
import yaml
from moto.server import ThreadedMotoServer
from rich.console import Console

from benchmarks.support import ROOT, answers, chat, free_port, parser, report, spread

MODEL: Final = "bench"
SLOTS: Final = 4
WORKERS: Final = 2
RANK: Final = 8
COLD: Final = 12
QUEUED_TOKENS: Final = 60
MANY: Final = (10, 10_000)
GOAL_LISTING_MS: Final = 50.0
GOAL_MEMORY_MIB: Final = 50.0
MIB: Final = 2**20
PARTS: Final = {"fetch": "lorayard_adapter_fetch_seconds", "load": "lorayard_adapter_load_seconds"}


def main() -> None:
    """Run both, print the table, write the file."""
    top = parser("adapters", __doc__.partition("\n")[0])
    top.add_argument("--only", choices=("cold", "many"))
    top.add_argument("--engine", choices=("emulated", "vllm"), default="emulated")
    top.add_argument("--model", default=MODEL, metavar="FOLDER", help="with --engine vllm")
    top.add_argument("--mib", type=int, default=16, help="size of each adapter in `cold`")
    arguments = top.parse_args()
    rows: list[tuple[str, ...]] = []
    data: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.only != "many":
            found = data["cold"] = cold(folder / "cold", arguments)
            rows += cold_rows(found)
        if arguments.only != "cold":
            counted = data["many"] = many(folder / "many", arguments.rounds)
            rows += many_rows(counted)
    report(
        f"Adapters: cold, and many ({arguments.engine} engine)",
        ("case", "median", "least", "most", "goal"),
        rows,
        arguments.json,
        data,
    )


# A cold adapter.


def cold(folder: Path, arguments: Any) -> dict[str, Any]:  # noqa: ANN401
    """The parts of cold first tokens, in milliseconds, one adapter after another."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }
        os.environ.update(environment)
        client = boto3.client("s3")
        client.create_bucket(Bucket="adapters")
        weights = padded_weights(arguments.mib * MIB)
        names = [f"cold-{number:03}" for number in range(2 * COLD)]
        for name in names:
            for file, content in (
                ("adapter_config.json", config(arguments.model)),
                ("adapter_model.safetensors", weights),
            ):
                client.put_object(Bucket="adapters", Key=f"{MODEL}/{name}/{file}", Body=content)
        settings = configuration(
            f"s3://adapters/{MODEL}", engine=arguments.engine, model=arguments.model
        )
        with served(settings, folder) as (url, _):
            idle = asyncio.run(one_by_one(url, names[:COLD], queued=False))
            queued = asyncio.run(one_by_one(url, names[COLD:], queued=True))
    finally:
        server.stop()
    return {"mib": arguments.mib, "engine": arguments.engine, "idle": idle, "queued": queued}


async def one_by_one(url: str, names: list[str], *, queued: bool) -> dict[str, Any]:
    """Ask for one cold adapter after another; each one's whole and parts."""
    found: dict[str, list[float]] = {
        name: [] for name in ("whole", "fetch", "load", "rest", "hot", "queue")
    }
    async with aiohttp.ClientSession() as session:
        for name in names:
            crowd = [
                asyncio.create_task(first_token_ms(session, url, MODEL, QUEUED_TOKENS))
                for _ in range(WORKERS * 8 if queued else 0)
            ]
            if queued:
                await asyncio.sleep(0.05)  # all of them are placed or wait
            before = await counters(session, url)
            whole, queue = await asyncio.gather(
                first_token_ms(session, url, f"{MODEL}:{name}", 1),
                first_token_ms(session, url, MODEL, 1),
            )
            after = await counters(session, url)
            parts = {part: 1e3 * (after[part] - before[part]) for part in PARTS}
            # A load is counted from its decision on, the fetch before it apart.
            found["whole"].append(whole)
            found["fetch"].append(parts["fetch"])
            found["load"].append(parts["load"])
            found["rest"].append(whole - sum(parts.values()))
            found["queue"].append(queue)
            await asyncio.gather(*crowd)
            found["hot"].append(await first_token_ms(session, url, f"{MODEL}:{name}", 1))
    return {part: spread(values) for part, values in found.items()}


async def first_token_ms(
    session: aiohttp.ClientSession, url: str, model: str, tokens: int
) -> float:
    """From the request to the first chunk of its answer; reads it to its end."""
    body = msgspec.json.encode(chat(model, tokens, stream=True))
    started = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url}/v1/chat/completions", data=body, headers=headers) as answer:
        if answer.status != 200:
            raise SystemExit(f"{answer.status}: {await answer.text()}")
        await answer.content.readany()
        first = time.perf_counter() - started
        await answer.content.read()
    return first * 1e3


async def counters(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """The sums of the parts' histograms, in seconds."""
    async with session.get(f"{url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return {
        part: sum(
            float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}_sum")
        )
        for part, name in PARTS.items()
    }


def cold_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The table's."""
    for case in ("idle", "queued"):
        for part, values in found[case].items():
            text = {
                "hot": "the same again, resident",
                "rest": "lookup, queue, engine, router",
                "queue": "the base model beside it",
            }
            yield (
                f"cold, {found['mib']} MiB, {case}: {text.get(part, part)}",
                *(f"{values[key]:.1f} ms" for key in ("median", "min", "max")),
                "",
            )


# Many adapters.


def many(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Start, memory and listing, with few and with many adapters."""
    found = []
    for count in MANY:
        store = folder / f"store-{count}"
        for number in range(count):
            place = store / f"adapter-{number:05}"
            place.mkdir(parents=True)
            (place / "adapter_config.json").write_bytes(config(MODEL))
            (place / "adapter_model.safetensors").write_bytes(SMALL)
    for _ in range(rounds):  # in turn, so that what else the machine does falls on both
        for count in MANY:
            settings = configuration(str(folder / f"store-{count}"))
            with served(settings, folder / f"run-{count}") as (url, process):
                ready_s = time.perf_counter() - process.began
                until_listed(url, count + 1)
                found.append(
                    {
                        "adapters": count,
                        "ready_s": ready_s,
                        "rss_mib": rss_mib(process.pid),
                        "listing_ms": statistics.median(listing_ms(url) for _ in range(9)),
                    }
                )
    return [
        {
            "adapters": count,
            **{
                name: spread([one[name] for one in found if one["adapters"] == count])
                for name in ("ready_s", "rss_mib", "listing_ms")
            },
        }
        for count in MANY
    ]


def many_rows(found: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The table's, and whether the goals are met."""
    few, most = found
    for one in found:
        for name, unit in (
            ("ready_s", "s"),
            ("rss_mib", "MiB"),
            ("listing_ms", "ms"),
        ):
            goal = ""
            if one is most:
                more = one[name]["median"] - few[name]["median"]
                goal = {
                    "ready_s": f"no slower: {more:+.2f} s",
                    "rss_mib": f"under +{GOAL_MEMORY_MIB:g}: {more:+.1f}",
                    "listing_ms": f"under {GOAL_LISTING_MS:g} ms",
                }.get(name, "")
            yield (
                f"{one['adapters']:,} adapters: {name.rpartition('_')[0].replace('_', ' ')}",
                *(f"{one[name][key]:.2f} {unit}" for key in ("median", "min", "max")),
                goal,
            )


def listing_ms(url: str) -> float:
    """One `GET /v1/models`, read whole."""
    started = time.perf_counter()
    with urllib.request.urlopen(f"{url}/v1/models") as answer:  # noqa: S310  (loopback)
        answer.read()
    return (time.perf_counter() - started) * 1e3


def until_listed(url: str, count: int) -> None:
    """Wait until the listing is whole: a long one is not waited for at the start."""
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(f"{url}/v1/models") as answer:  # noqa: S310  (loopback)
            if len(json.loads(answer.read())["data"]) >= count:
                return
        if time.monotonic() > deadline:
            raise SystemExit("the listing is not whole after 60 s")
        time.sleep(0.05)


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"process {pid} has ended")


# What both start.


def configuration(store: str, *, engine: str = "emulated", model: str = MODEL) -> dict[str, Any]:
    """Two workers over a store."""
    llm: dict[str, Any] = {
        "model_loading_config": {"model_id": MODEL, "model_source": model},
        "lora_config": {
            "dynamic_lora_loading_path": store,
            "max_num_adapters_per_replica": SLOTS,
            "accepted_base_models": [Path(model).name],
        },
        "engine_kwargs": {"max_lora_rank": RANK, "max_num_seqs": 8},
        "deployment_config": {
            "max_ongoing_requests": 8,
            "autoscaling_config": {"min_replicas": WORKERS, "max_replicas": WORKERS},
        },
        "engine": engine,
    }
    if engine == "vllm":
        llm["engine_kwargs"] |= {"max_model_len": 2048, "enforce_eager": True}
    return {"llm_configs": [llm]}


class Process:
    """A router that was started: its process, and when."""

    def __init__(self, pid: int, began: float) -> None:
        self.pid = pid
        self.began = began


@contextmanager
def served(config: dict[str, Any], folder: Path) -> Iterator[tuple[str, Process]]:
    """A router with an empty cache that is ready; stopped at the end."""
    with tempfile.TemporaryDirectory() as cache:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        router = {"port": port, "cache_dir": cache}
        path.write_text(yaml.safe_dump({**config, "router": router}))
        began = time.perf_counter()
        with (folder / "router.log").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "router", "serve", str(path)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        try:
            while not answers(f"{url}/ready"):
                if process.poll() is not None:
                    raise SystemExit((folder / "router.log").read_text()[-2000:])
                time.sleep(0.01)
            yield url, Process(process.pid, began)
        finally:
            process.terminate()
            process.wait(60)


def config(model: str) -> bytes:
    """An adapter's own configuration."""
    return json.dumps(
        {
            "peft_type": "LORA",
            "base_model_name_or_path": Path(model).name,
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "target_modules": ["q_proj"],
            "bias": "none",
        }
    ).encode()


def padded_weights(size: int) -> bytes:
    """A sound safetensors file of about this size: one pair of matrices, as wide as it takes."""
    columns = max(8, size // 2 // (4 * RANK))
    header: dict[str, Any] = {}
    offset = 0
    for part, shape in (("A", [RANK, columns]), ("B", [columns, RANK])):
        end = offset + 4 * RANK * columns
        name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + os.urandom(offset)


SMALL: Final = padded_weights(1024)


if __name__ == "__main__":
    Console().print("adapters: starts routers and an S3 server on this machine", highlight=False)
    main()
