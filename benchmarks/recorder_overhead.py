"""What recording costs a request: CPU time of two routers over one engine, one of which records.

Both are driven in short turns, and compared as the median of the rounds' ratios. The first table rows
are the recorder alone, in this process: a request's row from its arrival to the file, and what is
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
CHUNKS = 200_000
TURNS = (0, 1, 1, 0, 1, 0, 0, 1)  # short ones, so that what else the machine does falls on both
# requests, tokens of each, clients, streamed
CASES = [
    ("64 clients, 1 token", 1000, 1, 64, False),
    ("64 clients, 100 tokens, streamed", 64, 100, 64, True),
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
        ("the recorder alone, a request", "", f"{row_us['median']:.1f}", ""),
        ("the recorder alone, a chunk", "", f"{chunk_us['median']:.2f}", ""),
    ]
    data.insert(0, {"case": "the recorder alone", "cpu_us": row_us, "cpu_us_per_chunk": chunk_us})
    report(
        f"Recording against not recording, medians of {arguments.rounds} rounds",
        ("case", "off, CPU µs", "on, CPU µs", "on / off"),
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
    for _ in range(CHUNKS):
        answer.passes(chunk)
    return row_us, (time.process_time() - started) * 1e6 / (CHUNKS)


def measure(
    urls: list[str], pids: list[int], rounds: int
) -> tuple[list[tuple[str, ...]], list[dict[str, Any]]]:
    """Drive both routers in turn; the table's rows and the figures."""
    rows: list[tuple[str, ...]] = []
    data: list[dict[str, Any]] = []
    for title, requests, tokens, clients, stream in CASES:
        bodies = [chat(MODEL, tokens, stream=stream)] * requests
        for url in urls:
            asyncio.run(drive(url, bodies[:clients], clients=clients))
        figures: dict[str, list[float]] = {"off_cpu_us": [], "on_cpu_us": [], "cpu_ratio": []}
        for _ in range(rounds):
            used_s = [0.0, 0.0]
            for which in TURNS:
                before = cpu_s(pids[which])
                asyncio.run(drive(urls[which], bodies, clients=clients))
                used_s[which] += cpu_s(pids[which]) - before
            off_us, on_us = (used * 1e6 / (requests * len(TURNS) / 2) for used in used_s)
            figures["off_cpu_us"].append(off_us)
            figures["on_cpu_us"].append(on_us)
            figures["cpu_ratio"].append(on_us / off_us)
        found = {name: spread(values) for name, values in figures.items()}
        ratio = found["cpu_ratio"]
        rows.append(
            (
                title,
                f"{found['off_cpu_us']['median']:.0f}",
                f"{found['on_cpu_us']['median']:.0f}",
                f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})",
            )
        )
        data.append({"case": title, **found})
    return rows, data


if __name__ == "__main__":
    assert ROOT.is_dir()
    main()
