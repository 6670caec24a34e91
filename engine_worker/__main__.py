"""`python -m engine_worker`: one engine behind HTTP, on loopback or a Unix socket."""

import argparse
import json
import os
import socket
import sys
from pathlib import Path

from engine_worker.lifeline import guard
from engine_worker.options import WorkerOptions
from engine_worker.protocol import CORES_ENV, TOKEN_ENV


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m engine_worker",
        description=(
            "Serve one vLLM engine (or an emulation of one) with OpenAI routes, and the routes that "
            "a Lorayard router needs: load and unload adapters, pushed state."
        ),
        epilog=(
            f"The token that callers must send is read from the environment variable {TOKEN_ENV}. "
            "A worker that listens beyond this machine needs one."
        ),
    )
    top.add_argument("--engine", choices=("vllm", "emulated"), default="vllm")
    top.add_argument("--model", required=True, help="a folder or hub id with the base model")
    top.add_argument("--model-id", help="the id that requests use (default: --model)")
    top.add_argument(
        "--engine-kwargs",
        type=_object,
        default={},
        metavar="JSON",
        help='vLLM engine arguments, such as {"enable_lora": true, "max_loras": 4}',
    )
    top.add_argument("--calibration", help="latency model of the emulated engine")
    top.add_argument("--host", default="127.0.0.1", help="address to bind (default 127.0.0.1)")
    top.add_argument("--port", type=int, default=8100, help="0 lets the system choose")
    top.add_argument("--uds", type=Path, help="listen on this Unix socket instead")
    top.add_argument(
        "--max-ongoing-requests",
        type=int,
        default=0,
        metavar="N",
        help="refuse what is beyond N requests in flight, of all routers together (default: 0, none)",
    )
    top.add_argument(
        "--drain-timeout-s",
        type=float,
        default=30.0,
        help="how long running requests may take after SIGTERM (default 30)",
    )
    top.add_argument(
        "--exit-with-stdin",
        action="store_true",
        help="end when standard input closes: the launcher holds the other end",
    )
    return top


def _object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('not a JSON object, such as {"max_loras": 4}')
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the command line under a guardian; return the exit status."""
    top = parser()
    arguments = top.parse_args(argv)
    token = os.environ.pop(TOKEN_ENV, "") or None
    local = arguments.uds is not None or arguments.host in {"127.0.0.1", "::1", "localhost"}
    if token is None and not local:
        top.error(f"--host {arguments.host} is reachable from outside: set {TOKEN_ENV}")
    if cores := os.environ.get(CORES_ENV):
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    options = WorkerOptions(
        engine=arguments.engine,
        model=arguments.model,
        model_id=arguments.model_id or arguments.model,
        engine_kwargs=arguments.engine_kwargs,
        calibration=arguments.calibration,
        token=token,
        drain_timeout_s=arguments.drain_timeout_s,
        max_ongoing_requests=arguments.max_ongoing_requests,
    )
    try:
        listener = listen(arguments.host, arguments.port, arguments.uds)
    except OSError as error:
        where = arguments.uds or f"{arguments.host}:{arguments.port}"
        top.error(f"cannot listen on {where}: {error.strerror or error}")
    return guard(lambda: run(options, listener), lifeline=0 if arguments.exit_with_stdin else None)


def listen(host: str, port: int, uds: Path | None) -> socket.socket:
    """Bind the worker's socket, not yet listening; a Unix socket is for this user alone."""
    if uds is not None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            uds.unlink(missing_ok=True)
            listener.bind(str(uds))
        finally:
            os.umask(mask)
        return listener
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    return listener


def run(options: WorkerOptions, listener: socket.socket) -> int:
    """Serve, in the guarded child."""
    name = listener.getsockname()
    where = f"unix:{name}" if isinstance(name, str) else f"http://{name[0]}:{name[1]}"
    print(f"{options.engine} worker for {options.model_id}: {where}", flush=True)  # noqa: T201
    if options.engine == "vllm":
        from engine_worker.vllm_engine import serve  # noqa: PLC0415  (torch, only where needed)
    else:
        from engine_worker.emulated_engine import serve  # noqa: PLC0415
    return serve(options, listener)


if __name__ == "__main__":
    sys.exit(main())
