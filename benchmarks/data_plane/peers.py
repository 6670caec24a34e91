"""The peers, got without a hand: wheels into an environment of their own, HAProxy from the system.

All run round robin, the cheapest of their policies, and otherwise as they come: their logs, metrics,
retries and health checks are as they are by default, and so is this router's. Limits that the crowd
would run into are raised. HAProxy would collect a stream's chunks for 200 ms unless it is told not to
(`http-no-delay`), which nobody who streams tokens wants; how it comes is `haproxy-delaying`, measured
when it is asked for. One that cannot be had is left out, and the table says why.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.data_plane.contenders import Absent, Contender, Launch
from benchmarks.data_plane.wire import BASE
from benchmarks.support import ROOT, free_port

ENVIRONMENT: Final = ROOT / ".lorayard" / "peers"
INSTALL_S: Final = 600
CONCURRENT_MAX: Final = 16384
FILES_SPARE: Final = 128
NO_DELAY: Final = "    option http-no-delay\n"
HAPROXY_FILE: Final = """\
global
    nbthread 1
    maxconn {maxconn}
defaults
    mode http
    maxconn {maxconn}
    option http-keep-alive
{delay}    http-reuse safe
    timeout connect 5s
    timeout client 300s
    timeout server 300s
frontend all
    bind 127.0.0.1:{port} backlog 4096
    default_backend engines
backend engines
    balance roundrobin
    option httpchk GET /health
{servers}
"""


def vllm_router() -> Contender:
    """The vLLM project's router, in Rust. Raises `Absent`."""
    version = installed("vllm-router", "0.1.17")
    return Contender("vllm-router", version, _launch_vllm_router)


def _launch_vllm_router(engines: Sequence[int], port: int, folder: Path) -> Launch:
    del folder
    return Launch(
        [
            *_script("vllm-router"),
            *("--host", "127.0.0.1", "--port", str(port), "--worker-urls", *_urls(engines)),
            *("--policy", "round_robin", "--prometheus-port", str(free_port())),
        ],
        "/health",
    )


def smg() -> Contender:
    """The Shepherd Model Gateway, in Rust; it knows no adapters. Raises `Absent`."""
    version = installed("smg", "1.13.0")
    return Contender("smg", version, _launch_smg, models=(BASE,))


def _launch_smg(engines: Sequence[int], port: int, folder: Path) -> Launch:
    del folder
    return Launch(
        [
            *(*_script("smg"), "launch"),
            *("--host", "127.0.0.1", "--port", str(port), "--worker-urls", *_urls(engines)),
            *("--policy", "round_robin", "--backend", "vllm", "--disable-tokenizer-autoload"),
            *("--prometheus-port", str(free_port()), "--prometheus-host", "127.0.0.1"),
            *("--max-concurrent-requests", str(CONCURRENT_MAX)),
            *("--shutdown-grace-period-secs", "1"),
        ],
        "/readiness",
    )


def haproxy(name: str = "haproxy", delay: str = NO_DELAY) -> Contender:
    """HAProxy, which knows nothing of models: the floor of what it costs. Raises `Absent`."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
    found = shutil.which("haproxy", path=path)
    if found is None and os.geteuid() == 0 and (apt := shutil.which("apt-get")):
        _run([apt, "install", "-y", "-qq", "haproxy"])
        found = shutil.which("haproxy", path=path)
    if found is None:
        raise Absent("no haproxy in PATH; install the system's package `haproxy`")
    said = subprocess.run([found, "-v"], check=False, capture_output=True, text=True).stdout
    version = re.search(r"\d+\.\d+\.\d+", said)
    return Contender(
        name, version[0] if version else "?", partial(_launch_haproxy, found, delay=delay)
    )


def haproxy_delaying() -> Contender:
    """HAProxy as it comes, which collects small chunks for 200 ms. Raises `Absent`."""
    return haproxy("haproxy-delaying", delay="")


def _launch_haproxy(
    program: str, engines: Sequence[int], port: int, folder: Path, delay: str = NO_DELAY
) -> Launch:
    config = folder / "haproxy.cfg"
    servers = "\n".join(
        f"    server engine{number} 127.0.0.1:{engine} check"
        for number, engine in enumerate(engines)
    )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    maxconn = min(CONCURRENT_MAX, (files - FILES_SPARE) // 2)
    text = HAPROXY_FILE.format(maxconn=maxconn, delay=delay, port=port, servers=servers)
    config.write_text(text)
    return Launch([program, "-f", str(config), "-db"], "/health")


def _urls(engines: Sequence[int]) -> list[str]:
    return [f"http://127.0.0.1:{engine}" for engine in engines]


def _script(name: str) -> list[str]:
    return [str(ENVIRONMENT / "bin" / name)]


def installed(package: str, version: str) -> str:
    """Install a wheel into the peers' environment unless it is there; its version. Raises `Absent`.

    From where this machine's pip takes packages, and from a folder of wheels that PIP_FIND_LINKS names.
    """
    python = ENVIRONMENT / "bin" / "python"
    there = [path.name for path in ENVIRONMENT.glob("lib/python*/site-packages/*.dist-info")]
    if f"{package.replace('-', '_')}-{version}.dist-info" in there:
        return version
    uv = shutil.which(
        "uv", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    )
    if uv is None:
        raise Absent("no uv beside this Python; run `make install`")
    links = os.environ.get("PIP_FIND_LINKS")
    if not python.exists():
        _run([uv, "venv", "-q", "--python", sys.executable, str(ENVIRONMENT)])
    find = ["--find-links", links] if links else []
    _run([uv, "pip", "install", "-q", "--python", str(python), *find, f"{package}=={version}"])
    return version


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout or "").strip().splitlines()[-1:] or ["no word"]
        raise Absent(f"`{' '.join(command)}` failed: {last[0]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Absent(f"`{' '.join(command)}`: {error}") from None
