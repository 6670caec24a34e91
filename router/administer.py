"""`python -m router adapters ...`: what operators do, from a terminal, over a router's `/admin/v1`.

It prints a table as wide as the terminal, or with `--json` what the router answered. The exit status is
0 when it was done, 1 when the router could not do it or could not be reached, and 2 when it cannot be
asked so: a wrong command line, no key or a wrong one, no administration there.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote, urlencode

import msgspec
from rich.console import Console

from router.admin_client import AdminClient, AskError, RefusedError
from router.admin_tables import adapter_table, change_text, version_table, worker_table
from router.lifecycle.wire import (
    PAGE_MAX,
    AdapterPage,
    Changes,
    Load,
    Promote,
    Refresh,
    Rollout,
    WorkerList,
)
from router.lifecycle.words import AdapterStatus, Change

URL_ENV: Final = "LORAYARD_URL"
KEY_ENV: Final = "LORAYARD_ADMIN_KEY"
URL: Final = "http://127.0.0.1:8000"
TIMEOUT_S: Final = 900.0
# Where it is no terminal, a table has whatever width its content needs.
UNBOUNDED: Final = 10_000
EXAMPLES: Final = """\
examples:
  export LORAYARD_ADMIN_KEY=...               the router was started with the same
  python -m router adapters list              what there is, where, and how it is used
  python -m router adapters list sql-         those whose names begin so
  python -m router adapters load base:sql --workers 2
  python -m router adapters pin base:sql      never evict it
  python -m router adapters rollout base:sql 0123456789abcdef 0.1
  python -m router adapters promote base:sql  the trial went well: it serves all
  python -m router adapters rollback base:sql it did not
  python -m router adapters drain base-0      send that worker nothing new
  python -m router adapters list --json | jq -r '.adapters[] | select(.tier == "gpu") | .id'

An adapter's id is BASE:NAME, as requests write it in `model`.
"""
# What takes an adapter alone: command, help.
PLAIN: Final = {
    "unload": "drop it from every worker as soon as nobody uses it there",
    "warm": "bring it to the router's disk",
    "pin": "never evict it from where it is or comes to be",
    "unpin": "evict it again as any other",
    "rollback": "drop the candidate; without one, go back to the previous version",
}


def add_adapters_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add `adapters` to the command line."""
    top = commands.add_parser(
        "adapters",
        help="see and change the adapters and workers of a router that runs",
        description="See and change the adapters and workers of a router that runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--url",
        default=os.environ.get(URL_ENV) or URL,
        help=f"of the router; default: ${URL_ENV}, or {URL}",
    )
    shared.add_argument("--json", action="store_true", help="print what the router answered")
    shared.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT_S,
        metavar="S",
        help="how long an operation may take, in seconds; the router goes on after that (default: 900)",
    )
    actions = top.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, help_: str, run: Callable[[AdminClient, Any], Any]) -> Any:  # noqa: ANN401
        made = actions.add_parser(
            name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.", parents=[shared]
        )
        made.set_defaults(run=run)
        return made

    lister = action("list", "list adapters: version, where each is, size, use", _list)
    lister.add_argument("prefix", nargs="?", default="", help="only names that begin so")
    lister.add_argument("--model", default="", help="of this base model")
    shower = action("show", "show one adapter, with its versions", _show)
    _takes_adapter(shower)
    loader = action("load", "bring it to a worker, and return when it is there", _load)
    _takes_adapter(loader)
    loader.add_argument(
        "--workers", type=_count, default=1, metavar="N", help="to so many (default: 1)"
    )
    for name, help_ in PLAIN.items():
        _takes_adapter(action(name, help_, _plain))
    refresher = action("refresh", "look into the store now, and follow what is new", _refresh)
    refresher.add_argument("id", nargs="?", type=_adapter_id, help="BASE:NAME; all unless given")
    refresher.add_argument("--model", default="", help="all of this base model")
    roller = action("rollout", "give another version a share of the requests", _rollout)
    _takes_adapter(roller)
    roller.add_argument("version", help="as `show` lists it")
    roller.add_argument("weight", type=_share, help="its share, from 0 to 1")
    promoter = action("promote", "have the candidate serve all requests", _promote)
    _takes_adapter(promoter)
    promoter.add_argument("version", nargs="?", help="or this version, as `show` lists it")
    drainer = action("drain", "send a worker nothing new", _worker)
    drainer.add_argument("worker", help="as `workers` lists it")
    undrainer = action("undrain", "send a worker work again", _worker)
    undrainer.add_argument("worker", help="as `workers` lists it")
    worker_lister = action("workers", "list workers: their load, slots and adapters", _workers)
    worker_lister.add_argument("--model", default="", help="of this base model")


def administer(arguments: argparse.Namespace) -> int:
    """Do it; the exit status, having said what went wrong."""
    errors = Console(stderr=True, soft_wrap=True)
    try:
        # Where the router has several, while one is changed, any of them will do.
        keys = [key for key in map(str.strip, os.environ.get(KEY_ENV, "").split(",")) if key]
        client = AdminClient(arguments.url, keys[0] if keys else "", arguments.timeout)
        answer = arguments.run(client, arguments)
    except (AskError, RefusedError) as error:
        errors.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2 if isinstance(error, AskError) else 1
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode() + "\n")
    else:
        _print(answer)
    return 0


def _print(answer: object) -> None:
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=UNBOUNDED)
    match answer:
        case AdapterPage(adapters=adapters):
            console.print(adapter_table(adapters))
        case AdapterStatus():
            console.print(adapter_table([answer]))
            if answer.versions:
                console.print(version_table(answer.versions))
            if answer.message:
                console.print(answer.message, markup=False, soft_wrap=True)
        case WorkerList(models=models):
            console.print(worker_table(models))
        case Changes(changes=changes):
            for change in changes:
                console.print(change_text(change), markup=False, soft_wrap=True)
        case Change():
            console.print(change_text(answer), markup=False, soft_wrap=True)
        case _:
            raise AssertionError(answer)


# The actions: what to ask, and what comes back.


def _list(client: AdminClient, arguments: argparse.Namespace) -> AdapterPage:
    found: list[AdapterStatus] = []
    after: str | None = ""
    while after is not None:
        query = {
            "prefix": arguments.prefix,
            "model": arguments.model,
            "limit": PAGE_MAX,
            "after": after,
        }
        page = client.ask("GET", f"/adapters?{urlencode(query)}", AdapterPage)
        found += page.adapters
        after = page.after
    return AdapterPage(tuple(found))


def _show(client: AdminClient, arguments: argparse.Namespace) -> AdapterStatus:
    return client.ask("GET", _path(arguments), AdapterStatus)


def _load(client: AdminClient, arguments: argparse.Namespace) -> Change:
    return client.ask("POST", f"{_path(arguments)}/load", Change, Load(arguments.workers))


def _plain(client: AdminClient, arguments: argparse.Namespace) -> Change:
    return client.ask("POST", f"{_path(arguments)}/{arguments.action}", Change)


def _refresh(client: AdminClient, arguments: argparse.Namespace) -> Change | Changes:
    if arguments.id is not None:
        return client.ask("POST", f"{_path(arguments)}/refresh", Change)
    return client.ask("POST", "/refresh", Changes, Refresh(arguments.model or None))


def _rollout(client: AdminClient, arguments: argparse.Namespace) -> Change:
    body = Rollout(arguments.version, arguments.weight)
    return client.ask("POST", f"{_path(arguments)}/rollout", Change, body)


def _promote(client: AdminClient, arguments: argparse.Namespace) -> Change:
    return client.ask("POST", f"{_path(arguments)}/promote", Change, Promote(arguments.version))


def _workers(client: AdminClient, arguments: argparse.Namespace) -> WorkerList:
    return client.ask("GET", f"/workers?{urlencode({'model': arguments.model})}", WorkerList)


def _worker(client: AdminClient, arguments: argparse.Namespace) -> Change:
    worker = quote(arguments.worker, safe="")
    return client.ask("POST", f"/workers/{worker}/{arguments.action}", Change)


# What is written.


def _takes_adapter(command: argparse.ArgumentParser) -> None:
    command.add_argument("id", type=_adapter_id, metavar="BASE:NAME", help="the adapter")


def _path(arguments: argparse.Namespace) -> str:
    return f"/adapters/{quote(arguments.id, safe='')}"


def _adapter_id(text: str) -> str:
    base, _, name = text.partition(":")
    if base and name and ":" not in name:
        return text
    raise argparse.ArgumentTypeError(
        f"`{text}` is no adapter's id; write BASE:NAME, as `list` does"
    )


def _count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"`{text}` is no number above 0")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if 0 <= share <= 1:
        return share
    raise argparse.ArgumentTypeError(f"`{text}` is no share; write a number from 0 to 1")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if 0 < seconds <= 1e6:  # noqa: PLR2004  (what a socket takes)
        return seconds
    raise argparse.ArgumentTypeError(f"`{text}` is no time in seconds above 0")
