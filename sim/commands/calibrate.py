"""`python -m sim calibrate URL`: measure a running engine, and write its calibration."""

import argparse
import asyncio
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from engine_worker.protocol import TOKEN_ENV, Info
from sim.calibrate.design import Bounds, Point, rounds
from sim.calibrate.measure import Bench, LoadSeen, PromptSeen, Seen, StepSeen
from sim.calibrate.session import Head, Session, SessionError
from sim.calibrate.target import Target, TargetError, reach
from sim.commands import arguments as shared

if TYPE_CHECKING:
    from sim.calibrate.fit import Fit
    from sim.commands import Commands
    from sim.latency import Calibration

USER_ERRORS = (TargetError, SessionError)
ANSWER_TIMEOUT_S = 600


def add(commands: "Commands") -> None:
    """Describe the command."""
    command = commands.add_parser(
        "calibrate",
        help="measure a running engine and write its latency model",
        description=(
            "Drive a running engine worker (or a stock vLLM server) through a designed set of batch "
            "sizes, context lengths, adapters, prompts and loads, fit the latency model by robust "
            "regression, and write a calibration file. The engine should serve nobody else "
            "meanwhile. What was seen is kept beside the calibration: an interrupted run goes on "
            "where it ended when it is started again, and a finished one is only fitted again."
        ),
        epilog=(
            "example: python -m engine_worker --model my-model --port 9001 --engine-kwargs "
            '\'{"enable_lora": true, "max_loras": 4}\' & python -m sim calibrate '
            "http://127.0.0.1:9001 --adapter ./adapters/one --out my-model.json; then "
            "`calibration: my-model.json` in the configuration"
        ),
    )
    command.add_argument("url", metavar="URL", help="an engine worker, or a stock vLLM server")
    command.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    command.add_argument("--name", help="the calibration's name (default: the file's)")
    command.add_argument(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="a LoRA adapter that the engine can read; it is loaded under many names",
    )
    command.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="URL",
        help="another engine on the same host, to be kept busy for half of the measurements: "
        "how much engines that share a machine slow each other (repeat for more)",
    )
    command.add_argument("--rounds", type=shared.positive, default=3, help="default 3")
    command.add_argument("--quick", action="store_true", help="fewer points: a rough idea")
    stock = command.add_argument_group(
        "a stock vLLM server", "says over HTTP too little of itself; how was it started?"
    )
    for option, default in (
        ("--max-loras", 0),
        ("--max-lora-rank", 16),
        ("--max-num-seqs", 0),
        ("--max-num-batched-tokens", 0),
        ("--max-model-len", 0),
    ):
        stock.add_argument(option, type=shared.natural, default=default, metavar="N")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, errors: Console) -> int:
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
        f"written to {arguments.out}; use it as `calibration: {arguments.out}`", highlight=False
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
        head = Head(info, arguments.rounds, arguments.quick, len(beside), path or "")
        session = Session(arguments.out.with_suffix(".observations.jsonl"), head)
        if session.done:
            errors.print(
                f"{len(session.done)} of {len(todo)} points are in {session.path} already; remove "
                "it to measure anew",
                highlight=False,
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
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as progress:
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
