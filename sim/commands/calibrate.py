"""`python -m sim calibrate URL`: measure a running engine, and write its calibration."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sim.commands import arguments as shared

if TYPE_CHECKING:
    from sim.commands import Commands


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
    # Only here: the other commands need no HTTP client.
    from sim.calibrate.run import calibrate  # noqa: PLC0415

    return calibrate(arguments, errors)
