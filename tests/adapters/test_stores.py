"""One conformance test over every store, each at a real server that is started here."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest
from adapter_files import write_adapter
from emulators import (
    azure_container,
    azure_put,
    azure_server,
    azurite,
    environment,
    gcs_bucket,
    gcs_put,
    gcs_server,
)
from file_server import file_server
from hub_server import REPO, hub_server
from object_store import s3_server

from router.adapters.checksum import Algorithm, Checksum, hasher
from router.adapters.open import open_store
from router.adapters.store import (
    AdapterGoneError,
    AdapterStore,
    StoredAdapter,
    StoreError,
)

pytestmark = pytest.mark.xdist_group("stores")

Put = Callable[[str, bytes], None]  # a key under the store's URL, and the content
CONFIG, WEIGHTS, SUMS = "adapter_config.json", "adapter_model.safetensors", "SHA256SUMS"
MANY = 1_200


class Place(NamedTuple):
    """A store, how to put a file into it, its URL, and the URL of one that is not there."""

    kind: str
    url: str
    put: Put
    missing: str

    def open(self) -> AdapterStore:
        return open_store(self.url)


class Servers:
    """One of each kind for the whole module; a place of its own for each test."""

    def __init__(self, kind: str, folder: Path, endpoint: str) -> None:
        self.kind = kind
        self.folder = folder
        self.endpoint = endpoint
        self._count = 0

    def place(self) -> Place:
        self._count += 1
        name = f"place{self._count}"
        match self.kind:
            case "s3":
                client = boto3.client("s3")
                client.create_bucket(Bucket=name)

                def put(key: str, data: bytes) -> None:
                    client.put_object(Bucket=name, Key=f"some/prefix/{key}", Body=data)

                return Place("s3", f"s3://{name}/some/prefix/", put, "s3://no-such-bucket-here/x")
            case "gs":
                gcs_bucket(self.endpoint, name)

                def put(key: str, data: bytes) -> None:
                    gcs_put(self.endpoint, name, f"some/prefix/{key}", data)

                return Place("gs", f"gs://{name}/some/prefix", put, "gs://no-such-bucket-here/x")
            case "az":
                azure_container(self.endpoint, name)

                def put(key: str, data: bytes) -> None:
                    azure_put(name, f"some/prefix/{key}", data)

                return Place("az", f"az://{name}/some/prefix", put, "az://no-such-container/x")
            case _:
                top = self.folder / name
                top.mkdir(parents=True)
                urls = {
                    "local": (str(top), str(self.folder / "nowhere")),
                    "http": (f"{self.endpoint}/{name}", f"{self.endpoint}/nowhere"),
                    "hf": (f"hf://{REPO}/{name}", "hf://acme/nothing"),
                }
                url, missing = urls[self.kind]

                def put(key: str, data: bytes) -> None:
                    (top / key).parent.mkdir(parents=True, exist_ok=True)
                    (top / key).write_bytes(data)

                return Place(self.kind, url, put, missing)


@pytest.fixture(scope="module", params=["local", "s3", "gs", "az", "http", "hf"])
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    match kind:
        case "local":
            yield Servers(kind, folder, "")
        case "s3":
            with s3_server() as names:
                yield Servers(kind, folder, names["AWS_ENDPOINT_URL"])
        case "gs":
            with gcs_server(folder) as url:
                yield Servers(kind, folder, url)
        case "az":
            command = azurite()
            if command is None:
                pytest.skip("Azurite is not installed: `make install` has it from npm")
            with azure_server(command, folder) as url:
                yield Servers(kind, folder, url)
        case "http":
            with file_server(folder) as server:
                yield Servers(kind, folder, server.url)
        case "hf":
            with hub_server(folder) as (hub, _), environment({"HF_ENDPOINT": hub.url}):
                yield Servers(kind, folder, hub.url)


@pytest.fixture
def place(servers: Servers) -> Place:
    return servers.place()


def put_adapter(place: Place, name: str, folder: Path, seed: int, **changes: object) -> Path:
    """Put one made-up adapter into the store; its files as they are here."""
    write_adapter(folder / name, seed, **changes)
    for path in (folder / name).iterdir():
        place.put(f"{name}/{path.name}", path.read_bytes())
    return folder / name


def found(store: AdapterStore, name: str = "a") -> StoredAdapter:
    adapter = store.find(name)
    assert adapter is not None
    return adapter


def content(store: AdapterStore, adapter: StoredAdapter, name: str) -> bytes:
    file = adapter.file(name)
    assert file is not None
    return b"".join(store.read(adapter, file, 0, file.size))


def digest(checksum: Checksum, data: bytes) -> str:
    one = hasher(checksum.algorithm, len(data))
    one.update(data)
    return one.hexdigest()


def test_lists_what_is_an_adapter_and_nothing_else(place: Place, tmp_path: Path) -> None:
    put_adapter(place, "a", tmp_path, 1)
    put_adapter(place, "b.2-x_y", tmp_path, 2)
    put_adapter(place, "-bad-name", tmp_path, 3)
    put_adapter(place, "nested/deeper", tmp_path, 3)
    place.put("no-adapter/notes.txt", b"x")
    place.put("notes.txt", b"x")
    store = place.open()
    listed = store.list()
    assert list(listed) == ["a", "b.2-x_y"]
    one = found(store)
    assert listed["a"].revision == one.revision
    assert listed["a"].version == ("" if place.kind == "local" else one.version)
    assert {(file.name, file.size) for file in listed["a"].files} == {
        (path.name, path.stat().st_size) for path in (tmp_path / "a").iterdir()
    }
    assert len(one.version) == 16
    assert one.version != found(store, "b.2-x_y").version


@pytest.mark.parametrize("name", ["missing", "no-adapter", "..", "a/../b", "a/", "", "x" * 200])
def test_finds_nothing_under_other_names(place: Place, tmp_path: Path, name: str) -> None:
    put_adapter(place, "a", tmp_path, 1)
    place.put("no-adapter/notes.txt", b"x")
    assert place.open().find(name) is None


def test_a_name_that_begins_like_another_is_another(place: Place, tmp_path: Path) -> None:
    put_adapter(place, "ab", tmp_path, 1)
    assert place.open().find("a") is None


def test_reads_any_range(place: Place, tmp_path: Path) -> None:
    folder = put_adapter(place, "a", tmp_path, 1)
    store = place.open()
    adapter = found(store)
    for name in (CONFIG, WEIGHTS):
        data = (folder / name).read_bytes()
        assert content(store, adapter, name) == data
        file = adapter.file(name)
        assert file is not None
        for start, stop in [(0, 1), (7, 100), (file.size - 1, file.size), (50, file.size)]:
            assert b"".join(store.read(adapter, file, start, stop)) == data[start:stop]


def test_a_change_is_another_version_and_the_old_one_is_gone(place: Place, tmp_path: Path) -> None:
    put_adapter(place, "a", tmp_path, 1)
    store = place.open()
    old, listed = found(store), store.list()["a"]
    put_adapter(place, "a", tmp_path / "changed", 9)  # of the same size
    new = found(store)
    assert new.version != old.version
    assert store.list()["a"].revision != listed.revision
    for adapter in (old, listed):
        with pytest.raises(AdapterGoneError):
            content(store, adapter, WEIGHTS)


def test_the_same_content_is_the_same_version(
    place: Place, servers: Servers, tmp_path: Path
) -> None:
    folder = put_adapter(place, "a", tmp_path, 1)
    version = found(place.open()).version
    elsewhere = servers.place()
    put_adapter(elsewhere, "a", tmp_path / "again", 1)
    # Of a tag that need not depend on the content, the URL is a part.
    by_content = place.kind not in {"az", "http"}
    assert (found(elsewhere.open()).version == version) is by_content
    if place.kind != "az":  # where each writing has a tag of its own
        place.put(f"a/{WEIGHTS}", (folder / WEIGHTS).read_bytes())
        assert found(place.open()).version == version, "written again, unchanged"


def test_sums_are_a_part_of_the_version(place: Place, tmp_path: Path) -> None:
    put_adapter(place, "a", tmp_path, 1)
    before = found(place.open())
    place.put("a/README.md", b"of no matter")
    assert found(place.open()).version == before.version
    place.put(f"a/{SUMS}", b"0" * 64 + b"  adapter_config.json\n")
    after = found(place.open())
    assert after.version != before.version
    assert after.revision != before.revision


BEST = {
    "local": Algorithm.SHA256,
    "s3": Algorithm.CRC32,  # what boto3 has put there unasked
    "gs": Algorithm.MD5,
    "az": None,
    "http": None,
    "hf": Algorithm.SHA256,
}


def test_tells_a_checksum_of_the_content(place: Place, tmp_path: Path) -> None:
    folder = put_adapter(place, "a", tmp_path, 1)
    store = place.open()
    adapter = found(store)
    for name in (CONFIG, WEIGHTS):
        file = adapter.file(name)
        assert file is not None
        checksum = store.checksum(adapter, file)
        if name == WEIGHTS:
            assert (checksum.algorithm if checksum else None) is BEST[place.kind]
        if checksum is not None:
            assert digest(checksum, (folder / name).read_bytes()) == checksum.value


def test_a_store_that_is_not_there_says_so(place: Place) -> None:
    if place.kind == "http":
        pytest.skip("obstore takes a 404 to a listing of a web server for an empty folder")
    with pytest.raises(StoreError) as error:
        open_store(place.missing).list()
    assert place.missing.removesuffix("/x") in str(error.value)


def test_lists_more_than_a_page(place: Place) -> None:
    for number in range(MANY):
        place.put(f"a{number:04d}/{CONFIG}", b"{}")
    listed = place.open().list()
    assert list(listed) == [f"a{number:04d}" for number in range(MANY)]


def test_an_empty_store_has_no_adapters(place: Place) -> None:
    if place.kind == "hf":
        place.put("README.md", b"a hub knows no empty folder")
    assert place.open().list() == {}
