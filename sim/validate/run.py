"""One validation: the router as a process, the workloads through it, the simulation, the verdict."""

import argparse
import asyncio
import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from rich.console import Console

from router.config import Config, LLMConfig, load
from sim.commands import arguments as shared
from sim.errors import UserError
from sim.latency import DEFAULT, FOLDER, Validated, read_calibration
from sim.machine import machine
from sim.report.progress import counted
from sim.report.validation import markdown, print_comparisons
from sim.validate.compare import Comparison, Figures, compare, figures
from sim.validate.drive import drive
from sim.validate.record import Served, read_record
from sim.validate.simulate import simulate
from sim.validate.workloads import CASES, Case, rows

BOOT_TIMEOUT_S: Final = 900
STOP_TIMEOUT_S: Final = 60
READY: Final = re.compile(r"^ready on (http\S+)/v1$", re.MULTILINE)  # what `router serve` prints
EVICTIONS: Final = "lorayard_adapter_evictions_total"


class ValidateError(UserError):
    """The real side cannot be run. The message says why."""


class Recorded(msgspec.Struct, frozen=True):
    """What the recording itself does not say: when and where, and the evictions of each workload."""

    date: str
    machine: str
    evictions: dict[str, int]


def validate(arguments: argparse.Namespace, errors: Console) -> int:
    """Run both sides, print, write; return the exit status: 1 where a goal was missed."""
    config = load(arguments.config)
    for option, path in (("--json", arguments.json), ("--report", arguments.report)):
        shared.check_writable(option, path)
    names = arguments.cases.split(",")
    cases = [case for case in CASES if case.name in names]
    if len(cases) != len(names):
        known = ", ".join(case.name for case in CASES)
        raise ValidateError(f"--cases {arguments.cases}: known are {known}")
    if len(config.llm_configs) != 1 or not config.llm_configs[0].slots:
        raise ValidateError("the configuration has to serve one model, with adapters")
    record = arguments.record or Path(f"validation-{int(time.time())}.jsonl")
    about_file = record.with_suffix(".about.json")
    noted = _calibration_file(config.llm_configs[0]) if arguments.note else None
    if record.exists():
        errors.print(
            f"comparing with {record}; nothing is run",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    else:
        # Under its own name only when it is whole: an interrupted run is begun anew.
        partial = record.with_suffix(".partial.jsonl")
        partial.unlink(missing_ok=True)
        told = asyncio.run(_real(arguments, config, cases, partial, errors))
        about_file.write_bytes(msgspec.json.encode(told))
        partial.rename(record)
    try:
        recorded = msgspec.json.decode(about_file.read_bytes(), type=Recorded)
        found = _compare(arguments, config, cases, record, recorded.evictions, errors)
    except (KeyError, ValueError, IndexError, msgspec.DecodeError) as error:
        raise ValidateError(
            f"{record} is no recording of these cases and runs ({type(error).__name__}: {error}); "
            "remove it, or name the --cases and --runs that it was made with"
        ) from None
    if not arguments.record:
        record.unlink()
        about_file.unlink()
    print_comparisons(Console(), found)
    about = _about(config.llm_configs[0], arguments, recorded)
    if arguments.json is not None:
        data = {**about, "figures": [_finite(msgspec.to_builtins(one)) for one in found]}
        text = json.dumps(data, indent=2, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.report is not None:
        arguments.report.write_text(markdown(found, about, cases), encoding="utf-8")
    if noted is not None:
        _note(noted, recorded, found)
    return 0 if all(one.met is not False for one in found) else 1


def _calibration_file(llm: LLMConfig) -> Path:
    """The file to note the errors in, which can be written."""
    name = llm.calibration or DEFAULT
    path = Path(name) if name.endswith(".json") else Path(str(FOLDER / f"{name}.json"))
    if not os.access(path, os.W_OK):
        raise ValidateError(f"--note: {path} cannot be written; use a copy of it as calibration")
    return path


def _note(path: Path, recorded: "Recorded", found: Sequence[Comparison]) -> None:
    """Write into the calibration's file how far simulations with it were from reality."""
    errors: dict[str, float] = {}
    noise: dict[str, float] = {}
    for one in found:
        if one.goal is None or one.group == "adapters":
            continue
        if one.error is None or one.noise is None:
            raise ValidateError(f"{one.case}: requests were not answered; nothing is noted")
        key = f"{one.group} {one.name}"
        if one.error >= errors.get(key, 0.0):
            errors[key], noise[key] = round(one.error, 4), round(one.noise, 4)
    validated = Validated(
        date=recorded.date,
        workloads=tuple(dict.fromkeys(one.case for one in found)),
        errors=errors,
        noise=noise,
    )
    calibration = msgspec.structs.replace(read_calibration(str(path)), validated=validated)
    data = msgspec.json.format(msgspec.json.encode(calibration), indent=2)
    path.write_bytes(data + b"\n")


def _finite(value: Any) -> Any:  # noqa: ANN401  (JSON)
    """JSON has no infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def _label(case: Case, number: int) -> str:
    return f"{case.name}/{number}"


def _compare(
    arguments: argparse.Namespace,
    config: Config,
    cases: Sequence[Case],
    record: Path,
    evictions: dict[str, int],
    errors: Console,
) -> list[Comparison]:
    served = [one for one in read_record(record) if one.label]
    with errors.status("simulating"):
        simulations = [
            simulate(config, served, config.router.policy, seed) for seed in range(arguments.seeds)
        ]
    found: list[Comparison] = []
    for case in cases:
        real: list[Figures] = []
        simulated: list[Figures] = []
        for number in range(arguments.runs):
            label = _label(case, number)
            real.append(figures(_of(served, label), evictions[label]))
            simulated += [
                figures(_of(one.served, label), one.evictions[label]) for one in simulations
            ]
        found += compare(case.name, real, simulated)
    return found


def _of(served: Sequence[Served], label: str) -> list[Served]:
    return [one for one in served if one.label == label]


# The real side.


async def _real(
    arguments: argparse.Namespace,
    config: Config,
    cases: Sequence[Case],
    record: Path,
    errors: Console,
) -> "Recorded":
    llm = config.llm_configs[0]
    evictions: dict[str, int] = {}
    async with _router(arguments.config, record, errors) as (client, url):
        names = await _adapters(client, url, llm.model_id)
        slots = llm.slots * llm.replicas
        plan: list[tuple[str, list[Any]]] = []
        for number in range(arguments.runs):
            for case in cases:
                if len(names) < round(case.adapters * slots):
                    raise ValidateError(
                        f"the store has {len(names)} adapters, and `{case.name}` takes "
                        f"{round(case.adapters * slots)}"
                    )
                made = rows(
                    case,
                    base=llm.model_id,
                    names=names,
                    slots=slots,
                    rate=arguments.rate,
                    requests=arguments.requests,
                    seed=arguments.seed,
                    longer=arguments.longer,
                )
                plan.append((_label(case, number), made))
        with counted(errors) as progress:
            task = progress.add_task("serving", total=sum(len(made) for _, made in plan))
            before = await _metric(client, url, EVICTIONS)
            for label, made in plan:
                progress.update(task, description=f"serving {label}")
                failed = await drive(
                    client,
                    url,
                    made,
                    label,
                    seed=label,
                    progress=lambda: progress.advance(task),
                )
                if failed:
                    errors.print(f"{label}: {failed} requests were not answered", style="yellow")
                after = await _metric(client, url, EVICTIONS)
                evictions[label], before = after - before, after
                await asyncio.sleep(arguments.pause)
    return Recorded(datetime.now(tz=UTC).date().isoformat(), machine(), evictions)


@contextlib.asynccontextmanager
async def _router(
    path: Path, record: Path, errors: Console
) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    """`router serve` as a process of its own, from its start to its clean end."""
    log = record.with_suffix(".log")
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603, ASYNC220  (our own program; once)
            [sys.executable, "-m", "router", "serve", str(path), "--record", str(record)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    timeout = aiohttp.ClientTimeout(total=None, connect=10)
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:
            with errors.status("the router's workers boot"):
                deadline = time.monotonic() + BOOT_TIMEOUT_S
                while (found := READY.search(log.read_text(errors="replace"))) is None:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise ValidateError(f"the router did not come up; see {log}")
                    await asyncio.sleep(0.5)
            yield client, found[1]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()


async def _adapters(client: aiohttp.ClientSession, url: str, base: str) -> list[str]:
    async with client.get(f"{url}/v1/models") as answer:
        served = msgspec.json.decode(await answer.read())
    ids = [str(one["id"]) for one in served["data"]]
    return sorted(name.partition(":")[2] for name in ids if name.startswith(f"{base}:"))


async def _metric(client: aiohttp.ClientSession, url: str, name: str) -> int:
    async with client.get(f"{url}/metrics") as answer:
        text = await answer.text()
    values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(name)]
    return int(sum(float(value) for value in values))


def _about(llm: LLMConfig, arguments: argparse.Namespace, recorded: "Recorded") -> dict[str, Any]:
    calibration = read_calibration(llm.calibration or DEFAULT)
    return {
        "command": shlex.join(["python", "-m", "sim", *sys.argv[1:]]),
        "date": recorded.date,
        "ran_on": recorded.machine,
        "model": llm.model_id,
        "workers": llm.replicas,
        "slots": llm.slots,
        "calibration": calibration.name,
        "calibrated": f"{calibration.engine}; {calibration.machine}; {calibration.date}",
        "runs": arguments.runs,
        "simulations": arguments.seeds,
    }
