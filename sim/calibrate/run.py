"""One calibration from its command line to its file: measure, fit, write, print."""

import argparse
import asyncio
import hashlib
import os
import shlex
import sys
import time
from typing import TYPE_CHECKING

import aiohttp
import msgspec
from rich.console import Console
from rich.table import Table

from engine_worker.protocol import TOKEN_ENV, Info
from sim.calibrate.design import Bounds, Point, rounds
from sim.calibrate.measure import Bench, LoadSeen, PromptSeen, Seen, StepSeen
from sim.calibrate.session import Head, Session
from sim.calibrate.target import Target, TargetError, reach
from sim.commands import arguments as shared
from sim.report.progress import counted

if TYPE_CHECKING:
    from sim.calibrate.fit import Fit
    from sim.latency import Calibration

ANSWER_TIMEOUT_S = 600


def calibrate(arguments: argparse.Namespace, errors: Console) -> int:
    """Measure, fit, write; return the exit status."""
    shared.check_writable("--out", arguments.out)
    if arguments.out.suffix != ".json":
        raise TargetError(f"--out {arguments.out}: name a .json file")
    try:
        from sim.calibrate.fit import fit  # noqa: PLC0415  (NumPy and SciPy are an extra)
        from sim.calibrate.write import calibration  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise TargetError(
            f"{error.name} is not installed; calibrate needs: pip install 'lorayard[calibrate]'"
        ) from None
    info, seen = asyncio.run(_measure(arguments, errors))
    steps = [one for one in seen if isinstance(one, StepSeen)]
    prompts = [one for one in seen if isinstance(one, PromptSeen)]
    loads = [one for one in seen if isinstance(one, LoadSeen)]
    try:
        with errors.status("fitting, with 200 resamples for the intervals"):
            found = fit(steps, prompts)
    except ValueError as error:
        raise TargetError(str(error)) from None
    command = shlex.join(["python", "-m", "sim", *sys.argv[1:]])
    written = calibration(
        arguments.name or arguments.out.stem, info, found, loads, arguments.adapter, command
    )
    data = msgspec.json.format(msgspec.json.encode(written), indent=2)
    arguments.out.write_bytes(data + b"\n")
    _print(Console(), written, found)
    errors.print(
        f"written to {arguments.out}; use it as `calibration: {arguments.out}`",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


async def _measure(arguments: argparse.Namespace, errors: Console) -> tuple[Info, list[Seen]]:
    token = os.environ.get(TOKEN_ENV)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers
    ) as client:
        target = await reach(client, arguments.url, _stock(arguments), seed=str(time.time_ns()))
        beside = [
            await reach(client, url, _stock(arguments), seed=f"{url}{time.time_ns()}")
            for url in arguments.beside
        ]
        info = target.info
        if target.url in {one.url for one in beside}:
            raise TargetError(f"--beside {target.url} is the engine that is measured; name another")
        if info.max_loras and arguments.adapter is None:
            raise TargetError(
                f"{target.url} serves adapters; give one with --adapter FOLDER, so that its terms "
                "can be measured"
            )
        path = str(arguments.adapter.resolve()) if arguments.adapter else None
        todo = rounds(_bounds(target, beside), arguments.rounds, quick=arguments.quick)
        design = hashlib.blake2b(msgspec.json.encode(todo), digest_size=8).hexdigest()
        head = Head(info, arguments.rounds, arguments.quick, len(beside), path or "", design)
        session = Session(arguments.out.with_suffix(".observations.jsonl"), head)
        if session.done:
            errors.print(
                f"{len(session.done)} of {len(todo)} points are in {session.path} already; remove "
                "it to measure anew",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        bench = Bench(target, beside, path)
        try:
            await _run(bench, todo, session, errors)
        except aiohttp.ClientError as error:
            raise TargetError(f"{target.url}: {error}; start again to go on from here") from None
        finally:
            await bench.close()
        return info, session.seen


async def _run(bench: Bench, todo: list[Point], session: Session, errors: Console) -> None:
    await bench.warm_up()
    with counted(errors) as progress:
        task = progress.add_task("measuring", total=len(todo), completed=len(session.done))
        for number, point in enumerate(todo):
            if number not in session.done:
                session.add(number, await bench.measure(point))
                progress.advance(task)


def _bounds(target: Target, beside: list[Target]) -> Bounds:
    info = target.info
    return Bounds(
        max_num_seqs=info.max_num_seqs or 256,
        max_model_len=info.max_model_len or 2048,
        max_loras=info.max_loras,
        max_num_batched_tokens=info.max_num_batched_tokens or 2048,
        kv_tokens=info.kv_tokens,
        host_tier=info.max_cpu_loras > info.max_loras + 1,
        neighbours=bool(beside),
    )


def _stock(arguments: argparse.Namespace) -> Info | None:
    if not arguments.max_num_seqs or not arguments.max_num_batched_tokens:
        return None
    return Info(
        engine="vllm",
        engine_version="",
        model_id="",
        max_loras=arguments.max_loras,
        max_lora_rank=arguments.max_lora_rank,
        pid=0,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
    )


def _print(console: Console, written: "Calibration", found: "Fit") -> None:
    table = Table(title=f"{written.engine}, {written.model}, {written.machine}")
    for column in ("coefficient", "value", "95% interval"):
        table.add_column(column, justify="left" if column == "coefficient" else "right")
    for name, estimate in found.estimates.items():
        interval = "-"
        if estimate.interval:
            interval = f"{estimate.interval[0]:.4g} to {estimate.interval[1]:.4g}"
        table.add_row(name, f"{estimate.value:.4g}", interval)
    for name in ("load_host_s", "load_disk_s"):
        times = getattr(written, name).by_rank
        table.add_row(name, ", ".join(f"{value:.4g}" for value in times.values()), "-")
    console.print(table)
    console.print(
        f"median error of the fit: steps {found.step_error:.1%} of {found.steps}, prompts "
        f"{found.prompt_error:.1%} of {found.prompts}",
        highlight=False,
    )
