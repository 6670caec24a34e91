"""A router and its workers as real processes, started as a user starts them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import openai
import yaml

ROOT = Path(__file__).parents[2]
READY = re.compile(r"^ready on (http://\S+)/v1$", re.MULTILINE)


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 10) -> Any:  # noqa: ANN401
    """Poll until a condition is true; its value. Fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


class Deployment:
    """One `python -m router serve` and all that it started."""

    def __init__(
        self,
        config: dict[str, Any] | Path,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        *,
        options: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(config, Path):
            path = config
        else:
            router = {"port": 0, "cache_dir": str(folder / "cache"), **config.get("router", {})}
            path = folder / "config.yaml"
            path.write_text(yaml.safe_dump({**config, "router": router}))
        port = [] if isinstance(config, dict) else ["--port", "0"]
        self.folder = folder
        self.log_file = folder / "router.log"
        self._out = folder / "router.out"
        with self.log_file.open("wb") as log, self._out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "router", "serve", str(path), *port, *options],
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
            )
        self.url = ""

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_ready(self, timeout_s: float = 30) -> "Deployment":
        def ready() -> str:
            assert self.process.poll() is None, f"the router ended:\n{self.log}"
            found = READY.search(self._out.read_text())
            return found[1] if found else ""

        self.url = wait_until(ready, f"ready; the log:\n{self.log}", timeout_s)
        return self

    @cached_property
    def client(self) -> openai.OpenAI:
        """One for all of a test's requests; closed with the deployment."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120
        )

    def post(
        self, path: str, body: bytes | dict[str, Any], **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """POST; status, headers in lower case, and the decoded body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return fetch(self.url + path, data, headers)

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], Any]:
        return fetch(self.url + path, None, headers)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        _, _, text = self.get("/metrics")
        total = 0.0
        for line in text.splitlines():
            found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if found and all(
                f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()
            ):
                total += float(found[2])
        return total

    def workers(self) -> list[int]:
        """The guardians that the router started."""
        return children(self.process.pid)

    def descendants(self) -> list[int]:
        """Every process under the router, engines included."""
        return descendants(self.process.pid)

    def stop(self, timeout_s: float = 60) -> int:
        """SIGTERM, and wait for its end."""
        if "client" in self.__dict__:
            self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextmanager
def deployed(
    config: dict[str, Any] | Path,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    options: Sequence[str] = (),
    timeout_s: float = 30,
) -> Iterator[Deployment]:
    """A deployment that is ready, and is stopped at the end, whatever happened."""
    deployment = Deployment(config, folder, environment, options=options)
    try:
        yield deployment.wait_ready(timeout_s)
    finally:
        deployment.stop()


def fetch(
    url: str, data: bytes | None, headers: Mapping[str, str]
) -> tuple[int, dict[str, str], Any]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(  # noqa: S310  (loopback)
        url, data=data, headers={"Content-Type": "application/json", **names}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            return read(answer.status, answer)
    except urllib.error.HTTPError as error:
        with error:
            return read(error.code, error)


def read(status: int, answer: Any) -> tuple[int, dict[str, str], Any]:  # noqa: ANN401
    text = answer.read().decode()
    found = {name.lower(): value for name, value in answer.headers.items()}
    if "json" in found.get("content-type", ""):
        return status, found, json.loads(text)
    return status, found, text


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return sorted(one for one in everyone if (stat := stat_of(one)) and stat[1] == pid)


def descendants(pid: int) -> list[int]:
    """All processes below a process."""
    return [found for child in children(pid) for found in (child, *descendants(child))]


def stat_of(pid: int) -> tuple[str, int] | None:
    """A process's state and parent; None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1])


def alive(pids: list[int]) -> list[int]:
    """Those of the processes that still run; a zombie does not."""
    return [pid for pid in pids if (stat := stat_of(pid)) and stat[0] != "Z"]
