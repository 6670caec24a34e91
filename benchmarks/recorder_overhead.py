"""What recording costs a request: CPU time of two routers over one engine, one of which records.

Both are driven in turn, round after round, and compared as the ratio of their medians. The first table
rows are the recorder alone, in this process: a request's row from its arrival to the file, and what is
read off each chunk of a stream.
"""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.support import ROOT, chat, cpu_s, drive, free_port, parser, report, running, spread
from router.config import RecordConfig
from router.core.job import AdapterRef, AdapterUse, Job, Outcome
from router.telemetry.answer import Answer
from router.telemetry.metrics import Metrics
from router.telemetry.recorder import Recorder

MODEL = "bench"
ALONE = 20_000
CHUNKS = 100
# requests, tokens of each, clients, streamed
CASES = [
    ("64 clients, 1 token", 4000, 1, 64, False),
    ("64 clients, 100 tokens, streamed", 256, 100, 64, True),
]


def main() -> None:
    """Run all cases in turn, print the table, write the file."""
    arguments = parser("recorder_overhead", __doc__.partition("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = [
            asyncio.run(recorder_alone(folder / f"{n}.jsonl")) for n in range(arguments.rounds)
        ]
        row_us, chunk_us = (spread([pair[index] for pair in alone]) for index in (0, 1))
        worker_url = f"http://127.0.0.1:{free_port()}"
        worker = [
            *(sys.executable, "-m", "engine_worker", "--engine", "emulated", "--model", MODEL),
            *("--port", worker_url.rpartition(":")[2]),
            *("--engine-kwargs", json.dumps({"max_num_seqs": 1024, "max_model_len": 8192})),
        ]
        commands, urls = [], []
        for record in (None, folder / "traffic.jsonl"):
            port = free_port()
            urls.append(f"http://127.0.0.1:{port}")
            config = folder / f"{port}.yaml"
            config.write_text(yaml.safe_dump(configuration(worker_url, port, folder)))
            option = ["--record", str(record)] if record else []
            commands.append([sys.executable, "-m", "router", "serve", str(config), *option])
        with (
            running(worker, f"{worker_url}/health", folder / "worker.log"),
            running(commands[0], f"{urls[0]}/ready", folder / "off.log") as off,
            running(commands[1], f"{urls[1]}/ready", folder / "on.log") as on,
        ):
            rows, data = measure(urls, [off.pid, on.pid], arguments.rounds)
    head = [
        ("the recorder alone, a request", "", f"{row_us['median']:.1f}", "", "", ""),
        ("the recorder alone, a chunk", "", f"{chunk_us['median']:.2f}", "", "", ""),
    ]
    data.insert(0, {"case": "the recorder alone", "cpu_us": row_us, "cpu_us_per_chunk": chunk_us})
    report(
        f"Recording against not recording, medians of {arguments.rounds} rounds",
        ("case", "off, CPU µs", "on, CPU µs", "ratio", "off /s", "on /s"),
        [*head, *rows],
        arguments.json,
        data,
    )


def configuration(worker_url: str, port: int, folder: Path) -> dict[str, Any]:
    """A router over the one worker."""
    llm = {
        "model_loading_config": {"model_id": MODEL},
        "deployment_config": {"max_ongoing_requests": 1024},
        "engine": "attached",
        "attach": [worker_url],
    }
    return {"llm_configs": [llm], "router": {"port": port, "cache_dir": str(folder)}}


async def recorder_alone(path: Path) -> tuple[float, float]:
    """CPU µs of one request's row, the thread's share included, and of one chunk of a stream."""
    recorder = Recorder.open(RecordConfig(str(path)), Metrics())
    adapter = AdapterRef(MODEL, "adapter-0001")
    usage = b'{"choices":[],"usage":{"prompt_tokens":700,"completion_tokens":200}}'
    started = time.process_time()
    for number in range(ALONE):
        job = Job(f"{number:032x}", adapter, prompt_tokens=700, max_output_tokens=400)
        recording = recorder.begin(job, MODEL)
        recording.worker = "bench-0"
        recording.adapter_use = AdapterUse.HIT
        recording.answer = Answer(recorder.clock)
        recording.answer.whole(usage)
        recorder.end(recording, Outcome.COMPLETED)
        if number % 1000 == 0:
            await recorder.flush()
    await recorder.aclose()
    row_us = (time.process_time() - started) * 1e6 / ALONE
    answer = Answer(time.monotonic)
    answer.begins("text/event-stream")
    chunk = b'data: {"choices": [{"delta": {"content": " word"}}]' + b" " * 150 + b"}\n\n"
    started = time.process_time()
    for _ in range(ALONE * CHUNKS // 10):
        answer.passes(chunk)
    return row_us, (time.process_time() - started) * 1e6 / (ALONE * CHUNKS // 10)


def measure(
    urls: list[str], pids: list[int], rounds: int
) -> tuple[list[tuple[str, ...]], list[dict[str, Any]]]:
    """Drive both routers in turn; the table's rows and the figures."""
    rows: list[tuple[str, ...]] = []
    data: list[dict[str, Any]] = []
    for title, requests, tokens, clients, stream in CASES:
        bodies = [chat(MODEL, tokens, stream=stream)] * requests
        figures: dict[str, list[float]] = {
            name: [] for name in ("off_cpu_us", "on_cpu_us", "off_per_s", "on_per_s")
        }
        for url in urls:
            asyncio.run(drive(url, bodies[:clients], clients=clients))
        for round_number in range(rounds):
            order = list(zip(("off", "on"), urls, pids, strict=True))
            for name, url, pid in order if round_number % 2 else reversed(order):
                before = cpu_s(pid)
                load = asyncio.run(drive(url, bodies, clients=clients))
                figures[f"{name}_cpu_us"].append((cpu_s(pid) - before) * 1e6 / requests)
                figures[f"{name}_per_s"].append(load.per_s)
        found = {name: spread(values) for name, values in figures.items()}
        off, on, off_per_s, on_per_s = (value["median"] for value in found.values())
        rows.append(
            (
                title,
                f"{off:.0f}",
                f"{on:.0f}",
                f"{on / off:.3f}",
                f"{off_per_s:,.0f}",
                f"{on_per_s:,.0f}",
            )
        )
        data.append({"case": title, **found, "cpu_ratio": on / off})
    return rows, data


if __name__ == "__main__":
    assert ROOT.is_dir()
    main()
