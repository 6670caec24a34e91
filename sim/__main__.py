"""`python -m sim COMMAND`: reads the command line, and says what is wrong in one line."""

import argparse
import signal
import sys
from typing import Final

from rich.console import Console

from router.config import ConfigError
from sim.commands import (
    calibrate,
    compare,
    convert,
    generate,
    recommend,
    replay,
    sweep,
    validate,
)
from sim.errors import UserError
from sim.fleet import EngineArgumentError
from sim.latency import CalibrationError
from sim.pool import PoolError
from sim.replay import UnknownModelError
from sim.traces import TraceError

COMMANDS: Final = (replay, compare, sweep, recommend, convert, generate, calibrate, validate)
USER_ERRORS: Final = (
    ConfigError,
    TraceError,
    CalibrationError,
    EngineArgumentError,
    UnknownModelError,
    PoolError,
    UserError,
    OSError,
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m sim",
        description="Run the production routing core over a trace, in simulated time.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = parser().parse_args(argv)
    errors = Console(stderr=True, emoji=False)
    try:
        status: int = arguments.run(arguments, errors)
    except USER_ERRORS as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted", style="red")
        return 130
    return status


if __name__ == "__main__":
    # Ended by a signal is interrupted: processes that were started are stopped, nothing is half done.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
