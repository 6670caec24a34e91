"""What can go wrong with a download, one test a row, over real HTTP: to S3 and to a web server."""

import asyncio
import hashlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest
from adapter_files import write_adapter
from deployment import ROOT, wait_until
from emulators import environment
from faults import Fault, FaultProxy, fault_proxy
from file_server import file_server
from object_store import s3_server, upload

from router.adapters.cache import AdapterCache
from router.adapters.open import open_store
from router.adapters.space import Space
from router.adapters.store import StoredAdapter
from router.adapters.transfer import Downloads
from router.adapters.validate import AdapterRules
from router.core.job import LoadError, LoadFault

pytestmark = pytest.mark.xdist_group("stores")

CONFIG, WEIGHTS, SUMS = "adapter_config.json", "adapter_model.safetensors", "SHA256SUMS"
PART = 16 * 1024  # the weights are 67,736 bytes: five parts
RULES = AdapterRules(("tiny",), rank_max=16)
FETCH = [sys.executable, str(ROOT / "tests" / "support" / "fetch_adapter.py")]


class Shop(NamedTuple):
    """A store behind a proxy that fails when told to, and where its files are changed."""

    kind: str
    url: str
    proxy: FaultProxy
    folder: Path

    def put(self, path: Path) -> None:
        """Put an adapter's file into the store; it is in `folder` already."""
        if self.kind == "s3":
            key = str(path.relative_to(self.folder))
            boto3.client("s3").put_object(Bucket=self.bucket, Key=key, Body=path.read_bytes())

    @property
    def bucket(self) -> str:
        return self.url.removeprefix("s3://")

    def find(self, name: str = "a") -> StoredAdapter:
        adapter = open_store(self.url).find(name)
        assert adapter is not None
        return adapter


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    with s3_server() as names:
        yield names["AWS_ENDPOINT_URL"]


@pytest.fixture(params=["s3", "http"])
def shop(request: pytest.FixtureRequest, tmp_path: Path, s3_url: str) -> Iterator[Shop]:
    folder = tmp_path / "store"
    write_adapter(folder / "a", 1)
    if request.param == "http":  # it knows no checksums of its own
        lines = [f"{sha256(folder / 'a' / name)}  {name}\n" for name in (CONFIG, WEIGHTS)]
        (folder / "a" / SUMS).write_text("".join(lines))
        with file_server(folder) as server, fault_proxy(server.url) as proxy:
            yield Shop("http", proxy.url, proxy, folder)
        return
    with fault_proxy(s3_url) as proxy, environment({"AWS_ENDPOINT_URL": proxy.url}):
        bucket = f"shop-{secrets.token_hex(4)}"
        upload(folder, bucket, "")
        yield Shop("s3", f"s3://{bucket}", proxy, folder)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cache_of(url: str, root: Path, *, timeout_s: float = 30, connections: int = 4) -> AdapterCache:
    cache = AdapterCache(
        open_store(url),
        root / "base",
        RULES,
        timeout_s=timeout_s,
        max_tries=3,
        downloads=Downloads(connections, part_bytes=PART),
        space=Space(root),
    )
    cache.prepare()
    return cache


def assert_whole(place: Path, folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        assert (place / name).read_bytes() == (folder / "a" / name).read_bytes()


def left_in(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "base").iterdir())


PASSING = [
    (Fault(WEIGHTS, cut_after=5000), "cut off in a part"),
    (Fault(WEIGHTS, times=2, cut_after=0), "cut off before the first byte, twice"),
    (Fault(CONFIG, cut_after=10), "cut off in the configuration"),
    (Fault(WEIGHTS, status=503), "503"),
    (Fault(WEIGHTS, times=2, status=500), "500, twice"),
    (Fault(WEIGHTS, status=429, headers={"Retry-After": "0"}), "429"),
    (Fault(WEIGHTS, corrupt=True), "a byte changed, once"),
]


@pytest.mark.parametrize(("fault", "what"), PASSING, ids=[what for _, what in PASSING])
async def test_what_passes_is_tried_again(
    shop: Shop, tmp_path: Path, fault: Fault, what: str
) -> None:
    adapter = shop.find()
    shop.proxy.faults = [Fault(**vars(fault))]
    place = await cache_of(shop.url, tmp_path / "cache").folder_of(adapter)
    assert_whole(place, shop.folder)
    assert left_in(tmp_path / "cache") == [place.name]
    assert shop.proxy.faults[0].times == 0, "it did happen"


LASTING = [
    (
        Fault(WEIGHTS, times=99, cut_after=100),
        LoadFault.STORE_UNAVAILABLE,
        "after 3 tries",
        None,
    ),
    (Fault(WEIGHTS, times=99, status=503), LoadFault.STORE_UNAVAILABLE, "after 3 tries", None),
    (Fault(WEIGHTS, times=99, status=403), LoadFault.STORE_UNAVAILABLE, "access denied", 5),
    (Fault(WEIGHTS, times=99, status=404), LoadFault.ADAPTER_CHANGED, "changed or gone", 5),
    (
        Fault(WEIGHTS, times=99, corrupt=True),
        LoadFault.ADAPTER_INVALID,
        rf"adapter a: a/{WEIGHTS} has the (sha256|crc32) [0-9a-f]+, but (SHA256SUMS|the store) "
        r"says [0-9a-f]+",
        10,
    ),
]


@pytest.mark.parametrize(
    ("fault", "load_fault", "message", "most_requests"),
    LASTING,
    ids=["cut off", "503", "403", "404", "changed bytes"],
)
async def test_what_lasts_is_told(
    shop: Shop,
    tmp_path: Path,
    fault: Fault,
    load_fault: LoadFault,
    message: str,
    most_requests: int | None,
) -> None:
    adapter = shop.find()
    shop.proxy.faults = [Fault(**vars(fault))]
    with pytest.raises(LoadError, match=message) as error:
        await cache_of(shop.url, tmp_path / "cache").folder_of(adapter)
    assert error.value.fault is load_fault
    if most_requests is not None:
        assert shop.proxy.requests[WEIGHTS] <= most_requests, "not in vain, again and again"
    assert not [name for name in left_in(tmp_path / "cache") if not name.startswith(".partial-")]


async def test_a_store_that_asks_to_wait_too_long_is_not_waited_for(
    shop: Shop, tmp_path: Path
) -> None:
    if shop.kind == "http":
        pytest.skip("obstore does not hand on Retry-After")
    slow_down = b"<Error><Code>SlowDown</Code><Message>reduce your rate</Message></Error>"
    fault = Fault(WEIGHTS, times=99, status=503, headers={"Retry-After": "3600"}, body=slow_down)
    adapter = shop.find()
    shop.proxy.faults = [fault]
    async with asyncio.timeout(20):
        with pytest.raises(LoadError, match=r"30 s \(download_timeout_s\): .*SlowDown: the store"):
            await cache_of(shop.url, tmp_path / "cache").folder_of(adapter)


@pytest.mark.parametrize("after", [0, 5000])
async def test_a_stall_ends_at_the_deadline_and_what_came_is_kept(
    shop: Shop, tmp_path: Path, after: int
) -> None:
    adapter = shop.find()
    shop.proxy.budget = 2 * PART + after
    async with asyncio.timeout(20):
        with pytest.raises(LoadError, match=r"not here after 1 s \(download_timeout_s\)"):
            await cache_of(shop.url, tmp_path / "cache", timeout_s=1).folder_of(adapter)
    before = shop.proxy.bytes[WEIGHTS]
    left = [f".partial-a@{adapter.version}", f".partial-a@{adapter.version}.journal"]
    await asyncio.to_thread(
        wait_until, lambda: left_in(tmp_path / "cache") == left, "its thread has ended too"
    )
    shop.proxy.forget()
    assert_whole(await cache_of(shop.url, tmp_path / "cache").folder_of(adapter), shop.folder)
    assert before + shop.proxy.bytes[WEIGHTS] < 67_736 + 4 * PART, "whole parts came once"
    assert shop.proxy.bytes[WEIGHTS] < 67_736


async def test_a_store_that_is_not_reached_is_given_up_at_the_deadline(
    shop: Shop, tmp_path: Path
) -> None:
    adapter = shop.find()

    def wait() -> None:
        shop.proxy.released.wait()

    shop.proxy.faults = [Fault("", times=99, before=wait)]
    async with asyncio.timeout(20):
        with pytest.raises(LoadError, match=r"not here after 0\.5 s"):
            await cache_of(shop.url, tmp_path / "cache", timeout_s=0.5).folder_of(adapter)


async def test_what_changes_while_it_is_downloaded_is_not_mixed(shop: Shop, tmp_path: Path) -> None:
    adapter = shop.find()

    def change() -> None:
        write_adapter(shop.folder / "a", 2)
        shop.put(shop.folder / "a" / WEIGHTS)

    shop.proxy.faults = [Fault(CONFIG, before=change)]
    # One connection: the weights come after the configuration.
    cache = cache_of(shop.url, tmp_path / "cache", connections=1)
    with pytest.raises(LoadError, match="changed or gone") as error:
        await cache.folder_of(adapter)
    assert error.value.fault is LoadFault.ADAPTER_CHANGED
    assert left_in(tmp_path / "cache") == []


# Processes of their own.


def fetcher(shop: Shop, root: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*FETCH, shop.url, str(root), "a", str(PART), *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended_well(process: "subprocess.Popen[str]") -> list[str]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.split()


def test_two_processes_fetch_one_adapter_once(shop: Shop, tmp_path: Path) -> None:
    processes = [fetcher(shop, tmp_path / "cache") for _ in range(3)]
    places = {ended_well(process)[0] for process in processes}
    assert len(places) == 1
    assert_whole(Path(places.pop()), shop.folder)
    assert shop.proxy.bytes[WEIGHTS] == 67_736
    assert shop.proxy.requests[CONFIG] == 1


@pytest.mark.parametrize("budget", [0, 1, PART - 1, PART, 2 * PART + 5, 4 * PART, 67_735])
def test_killed_anywhere_in_a_download_it_goes_on_from_there(
    shop: Shop, tmp_path: Path, budget: int
) -> None:
    if shop.kind == "s3" and budget not in {PART, 67_735}:
        pytest.skip("what is kept depends on the kind of store little")
    shop.proxy.budget = budget
    root = tmp_path / "cache"
    process = fetcher(shop, root)
    wait_until(shop.proxy.stalled.is_set, "the download stalls", 30)
    process.kill()
    process.communicate()
    assert not [name for name in left_in(root) if not name.startswith(".")], "nothing in place"
    version = shop.find().version
    journal = root / "base" / f".partial-a@{version}.journal"
    rows = [line.split() for line in journal.read_text().splitlines()[1:]]
    done = sum(int(stop) - int(start) for start, stop, _, name in rows if name == WEIGHTS)
    assert done <= budget
    shop.proxy.forget()
    (place, _) = ended_well(fetcher(shop, root))
    assert_whole(Path(place), shop.folder)
    assert shop.proxy.bytes[WEIGHTS] == 67_736 - done, "what was there is not fetched again"
    assert left_in(root) == [Path(place).name]


def test_killed_at_any_change_of_names_it_is_whole_or_not_there(shop: Shop, tmp_path: Path) -> None:
    if shop.kind == "s3":
        pytest.skip("nothing in it depends on the kind of store")
    (place, times) = ended_well(fetcher(shop, tmp_path / "first", "0"))
    version = Path(place).name
    for die_at in range(1, int(times) + 1):
        root = tmp_path / f"cache{die_at}"
        process = fetcher(shop, root, str(die_at))
        process.communicate(timeout=60)
        assert process.returncode == -9, die_at
        in_place = root / "base" / version
        if in_place.exists():
            assert_whole(in_place, shop.folder)
        (again, _) = ended_well(fetcher(shop, root))
        assert_whole(Path(again), shop.folder)
        assert left_in(root) == [version], die_at


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 320 KiB."""
    root = tmp_path / "disk"
    root.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(root)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        yield root
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


async def test_a_disk_that_fills_is_made_less_full(shop: Shop, small_disk: Path) -> None:
    cache = cache_of(shop.url, small_disk)
    first = shop.find()
    place = await cache.folder_of(first)
    (small_disk / "of-others").write_bytes(bytes(200 * 1024))
    write_adapter(shop.folder / "a", 2)
    (shop.folder / "a" / SUMS).unlink(missing_ok=True)
    for path in (shop.folder / "a").iterdir():
        shop.put(path)
    second = shop.find()
    cache.hold("a", first.version)
    with pytest.raises(LoadError, match=r"the disk of .* is full \(No space left on device\)"):
        await cache.folder_of(second)
    assert place.is_dir(), "it is held"
    cache.let_go("a", first.version)
    assert_whole(await cache.folder_of(second), shop.folder)
    assert not place.exists()
    assert cache.find("a", first.version) is None


async def test_a_disk_that_stays_full_is_told(shop: Shop, small_disk: Path) -> None:
    (small_disk / "of-others").write_bytes(bytes(280 * 1024))
    with pytest.raises(LoadError, match="make room, or set cache_dir to another disk") as error:
        await cache_of(shop.url, small_disk).folder_of(shop.find())
    assert error.value.fault is LoadFault.STORE_UNAVAILABLE
    assert left_in(small_disk) == []
