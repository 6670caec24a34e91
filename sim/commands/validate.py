"""`python -m sim validate`: a real router over real workers, and the simulation of what it served."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sim.commands import arguments as shared
from sim.validate.workloads import CASES

if TYPE_CHECKING:
    from sim.commands import Commands


def add(commands: "Commands") -> None:
    """Describe the command."""
    command = commands.add_parser(
        "validate",
        help="run the real router over real workers and compare the simulator with it",
        description=(
            "Start `router serve` with the configuration, send it several workloads twice (steady, "
            "bursty, more adapters than slots, long prompts), record what became of each request, "
            "simulate exactly that workload with the configuration's calibration, and print real "
            "against simulated, with the difference between the two real runs beside it."
        ),
        epilog="example: python -m sim validate --config configs/validate.yaml --rate 1",
    )
    command.add_argument("--config", type=Path, required=True, metavar="FILE")
    command.add_argument(
        "--rate",
        type=shared.above_zero,
        default=1.0,
        metavar="RPS",
        help="requests a second that the fleet can just bear (default 1)",
    )
    command.add_argument(
        "--requests", type=shared.positive, default=60, metavar="N", help="a workload (default 60)"
    )
    command.add_argument(
        "--longer",
        type=shared.above_zero,
        default=1.0,
        metavar="X",
        help="prompts and answers X times as long, for engines faster than a CPU (default 1: 48 "
        "and 16 tokens, long prompts 500)",
    )
    command.add_argument("--runs", type=shared.positive, default=2, help="real runs (default 2)")
    command.add_argument(
        "--pause", type=shared.not_negative, default=3.0, metavar="S", help="between workloads"
    )
    command.add_argument("--seeds", type=shared.positive, default=5, help="simulations (default 5)")
    command.add_argument("--seed", type=int, default=0, help="of the workloads (default 0)")
    command.add_argument(
        "--cases",
        default=",".join(case.name for case in CASES),
        help=f"default {','.join(case.name for case in CASES)}",
    )
    command.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="keep the recording here; where it exists, compare with it instead of running anything",
    )
    command.add_argument(
        "--note",
        action="store_true",
        help="note the errors in the calibration's file, so that each replay with it names them",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    command.add_argument("--report", type=Path, metavar="FILE.md", help="write a report here")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, errors: Console) -> int:
    """Run both sides, print, write; return the exit status: 1 where a goal was missed."""
    # Only here: the other commands need no HTTP client.
    from sim.validate.run import validate  # noqa: PLC0415

    return validate(arguments, errors)
