"""`python -m router serve CONFIG.yaml`, `check CONFIG.yaml`, `adapters ACTION` and `key NAME`.

What one command needs is imported when it runs: an operator's does not wait for what serving needs.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console

from router.administer import add_adapters_command, administer
from router.config import Config, ConfigError, RecordConfig, load
from router.keys import described, is_key_name, new_key

PORT_MAX = 65535
PROCESSES_MAX = 64


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m router",
        description="Serve many LoRA adapters of one base model on many vLLM workers.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    server = commands.add_parser(
        "serve",
        help="start the workers and serve OpenAI requests",
        description="Start or attach the workers that CONFIG names, and serve OpenAI requests.",
        epilog="example: python -m router serve configs/quickstart.yaml --port 8000",
    )
    server.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file; see configs/")
    server.add_argument("--host", help="instead of router.host")
    server.add_argument(
        "--port", type=_port, help="instead of router.port; 0 lets the system choose"
    )
    server.add_argument(
        "--processes",
        type=_count,
        metavar="N",
        help="instead of router.processes: N router processes at one port, over the same workers; each "
        "has 1/N of quotas and queue, and a recording of its own (FILE.0.jsonl, FILE.1.jsonl ...)",
    )
    server.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="record the traffic as a trace for `python -m sim replay`, instead of router.record.path",
    )
    server.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info"
    )
    checker = commands.add_parser(
        "check",
        help="check a configuration and the adapters in its store, and start nothing",
        description="Check a configuration: the file, the model folder, the store, each adapter.",
    )
    checker.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file; see configs/")
    maker = commands.add_parser(
        "key",
        help="make an API key, and its entry for router.api_keys_file",
        description="Print a new API key, this once, and the entry by which the router will know it.",
        epilog="example: python -m router key team-a-ci --tenant team-a",
    )
    maker.add_argument("name", type=_key_name, metavar="NAME", help="what the router is to call it")
    maker.add_argument("--tenant", help="one of router.tenants, whom its holder is then taken for")
    add_adapters_command(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = parser().parse_args(argv)
    if arguments.command == "adapters":
        return administer(arguments)

    def work() -> int | None:
        if arguments.command == "key":
            print(described(arguments.name, new_key(), arguments.tenant))  # noqa: T201
            return 0
        config = load(arguments.config)
        if arguments.command == "check":
            from router.check import check  # noqa: PLC0415

            return check(config, Console(soft_wrap=True))
        from router.part import run  # noqa: PLC0415
        from router.serve import serve  # noqa: PLC0415
        from router.supervisor import supervise  # noqa: PLC0415

        config = _overridden(config, arguments)
        several = config.router.processes > 1
        set_up_logging(arguments.log_level, "--" if several else "")
        run(lambda: supervise(config, arguments.log_level) if several else serve(config))
        return 0

    return guarded(work)


def guarded(work: Callable[[], int | None]) -> int:
    """Do it; the exit status, having said what went wrong."""
    from router.adapters.store import StoreError  # noqa: PLC0415
    from router.adapters.validate import InvalidAdapterError  # noqa: PLC0415
    from router.check import CheckError  # noqa: PLC0415
    from router.lifecycle.registry import RegistryError  # noqa: PLC0415
    from router.supervisor import PartStartError  # noqa: PLC0415
    from router.telemetry.record_file import RecordError  # noqa: PLC0415
    from router.workers.process import WorkerStartError  # noqa: PLC0415

    errors = Console(stderr=True, soft_wrap=True)
    try:
        return work() or 0
    except PartStartError as error:  # it has said why
        return error.status if error.status > 0 else 1
    except (
        ConfigError,
        CheckError,
        StoreError,
        InvalidAdapterError,
        RecordError,
        RegistryError,
        WorkerStartError,
    ) as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    except OSError as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 1


def _overridden(config: Config, arguments: argparse.Namespace) -> Config:
    given = {
        "host": arguments.host,
        "port": arguments.port,
        "processes": arguments.processes,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if arguments.record is not None:
        record = config.router.record or RecordConfig("")
        changes["record"] = msgspec.structs.replace(record, path=str(arguments.record.resolve()))
    return msgspec.structs.replace(config, router=msgspec.structs.replace(config.router, **changes))


def set_up_logging(level: str, process: str = "") -> None:
    """Log to standard error, with the name of the process where there are several."""
    name = f"{process} " if process else ""
    logging.basicConfig(
        level=level.upper(),
        format=f"%(asctime)s %(levelname).1s {name}%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("botocore").setLevel(logging.WARNING)
    # It logs a traceback for what a client sends; what is the router's fault the front end logs.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


def _key_name(text: str) -> str:
    if is_key_name(text):
        return text
    raise argparse.ArgumentTypeError(
        f"`{text}` cannot be a key's name; use letters, digits, and . _ -, at most 64"
    )


def _count(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= PROCESSES_MAX:
        return int(text)
    raise argparse.ArgumentTypeError(f"`{text}` is no number from 1 to {PROCESSES_MAX}")


def _port(text: str) -> int:
    if text.isdecimal() and int(text) <= PORT_MAX:
        return int(text)
    raise argparse.ArgumentTypeError(f"`{text}` is no port, a number from 0 to {PORT_MAX}")


if __name__ == "__main__":
    sys.exit(main())
