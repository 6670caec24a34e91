"""What is one kind of store's own: links, tags, checksums, tokens, and what must be installed."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
import urllib3
from adapter_files import write_adapter
from emulators import environment
from faults import fault_proxy
from file_server import file_server
from hub_server import REPO, hub_server
from object_store import s3_server

from router.adapters.address import problem_with
from router.adapters.checksum import Algorithm
from router.adapters.open import open_store
from router.adapters.store import AdapterGoneError, AdapterStore, StoredAdapter, StoreError

pytestmark = pytest.mark.xdist_group("stores")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def found(store: AdapterStore, name: str = "a") -> StoredAdapter:
    adapter = store.find(name)
    assert adapter is not None
    return adapter


def content(store: AdapterStore, adapter: StoredAdapter, name: str = WEIGHTS) -> bytes:
    file = adapter.file(name)
    assert file is not None
    return b"".join(store.read(adapter, file, 0, file.size))


# A local folder.


@pytest.mark.parametrize("what", ["folder", "file", "a file by ../"])
def test_a_link_out_of_the_folder_makes_an_adapter_none(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(tmp_path / "elsewhere")
    write_adapter(tmp_path / "store" / "good")
    bad = tmp_path / "store" / "a"
    if what == "folder":
        bad.symlink_to(tmp_path / "elsewhere")
    else:
        write_adapter(bad)
        (bad / WEIGHTS).unlink()
        way = "../../elsewhere" if "by" in what else str(tmp_path / "elsewhere")
        (bad / WEIGHTS).symlink_to(f"{way}/{WEIGHTS}")
    store = open_store(str(tmp_path / "store"))
    with caplog.at_level(logging.WARNING):
        assert list(store.list()) == ["good"]
        assert store.find("a") is None
        store.list()
    assert len(caplog.records) == 1, "told once"
    assert "a symbolic link that leads out of" in caplog.text


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    """As a cache of the hub has them: all files under one name, links to them under others."""
    write_adapter(tmp_path / "store" / "a")
    (tmp_path / "store" / "same").symlink_to("a")
    store = open_store(str(tmp_path / "store"))
    assert list(store.list()) == ["a", "same"]
    assert content(store, found(store, "same")) == content(store, found(store, "a"))
    assert found(store, "same").version == found(store, "a").version


def test_a_file_that_becomes_a_link_out_is_not_read(tmp_path: Path) -> None:
    write_adapter(tmp_path / "elsewhere")
    write_adapter(tmp_path / "store" / "a")
    store = open_store(str(tmp_path / "store"))
    adapter = found(store)
    (tmp_path / "store" / "a" / WEIGHTS).unlink()
    (tmp_path / "store" / "a" / WEIGHTS).symlink_to(tmp_path / "elsewhere" / WEIGHTS)
    with pytest.raises(AdapterGoneError):
        content(store, adapter)


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    write_adapter(tmp_path / "real" / "a")
    (tmp_path / "store").symlink_to(tmp_path / "real")
    store = open_store(str(tmp_path / "store"))
    assert content(store, found(store))


def test_the_folder_may_become_a_link_to_another(tmp_path: Path) -> None:
    """As whole releases of adapters are put in place, at once."""
    for number, name in enumerate(("old", "new")):
        write_adapter(tmp_path / name / "a", number)
    link = tmp_path / "current"
    link.symlink_to("old")
    store = open_store(str(link))
    before = found(store)
    link.with_name("next").symlink_to("new")
    link.with_name("next").replace(link)
    with pytest.raises(AdapterGoneError):
        content(store, before)
    after = found(store)
    assert after.version != before.version
    assert content(store, after) == (tmp_path / "new" / "a" / WEIGHTS).read_bytes()


def test_a_listing_of_a_folder_reads_no_file(tmp_path: Path) -> None:
    for number in range(50):
        write_adapter(tmp_path / f"a{number}")
    opened: list[str] = []
    listening = [True]

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "open" and str(tmp_path) in str(arguments[0]):
            opened.append(str(arguments[0]))

    sys.addaudithook(heard)
    store = open_store(str(tmp_path))
    assert len(store.list()) == 50
    assert opened == []
    found(store, "a7")
    listening.clear()
    assert len(opened) == 2


def test_what_was_hashed_is_not_read_again(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    for path in (tmp_path / "a").iterdir():
        os.utime(path, (1, 1))  # long ago: a change would show in the time
    store = open_store(str(tmp_path))
    first = found(store)
    (tmp_path / "a" / WEIGHTS).chmod(0)
    if os.geteuid():
        assert found(store) == first
    os.utime(tmp_path / "a" / WEIGHTS, (2, 2))
    (tmp_path / "a" / WEIGHTS).chmod(0o644)
    assert found(store).version == first.version
    assert found(store).revision != first.revision


# S3.


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as names:
        boto3.client("s3").create_bucket(Bucket="kinds")
        yield names["AWS_ENDPOINT_URL"]


CHECKSUMS = [
    ({"ChecksumAlgorithm": "SHA256"}, Algorithm.SHA256),
    ({"ChecksumAlgorithm": "CRC32C"}, Algorithm.CRC32C),
    ({"ChecksumAlgorithm": "CRC64NVME"}, Algorithm.CRC64NVME),
    ({"ChecksumAlgorithm": "CRC32"}, Algorithm.CRC32),
    ({"ChecksumAlgorithm": "SHA1"}, Algorithm.MD5),  # the next best: the ETag
]


@pytest.mark.parametrize(("how", "algorithm"), CHECKSUMS)
def test_the_best_checksum_of_an_object_is_told(
    s3: str, how: dict[str, Any], algorithm: Algorithm
) -> None:
    client = boto3.client("s3")
    for name in (CONFIG, WEIGHTS):
        client.put_object(Bucket="kinds", Key=f"sums/a/{name}", Body=b"123456789", **how)
    store = open_store("s3://kinds/sums")
    adapter = found(store)
    checksum = store.checksum(adapter, adapter.files[1])
    assert checksum is not None
    assert checksum.algorithm is algorithm


def test_an_object_put_in_parts_has_no_md5(s3: str) -> None:
    client = boto3.client("s3")
    client.put_object(Bucket="kinds", Key=f"parts/a/{CONFIG}", Body=b"{}")
    key = f"parts/a/{WEIGHTS}"
    upload = client.create_multipart_upload(Bucket="kinds", Key=key)["UploadId"]
    part = client.upload_part(
        Bucket="kinds", Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 1000
    )
    client.complete_multipart_upload(
        Bucket="kinds",
        Key=key,
        UploadId=upload,
        MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
    )
    store = open_store("s3://kinds/parts")
    adapter = found(store)
    assert "-" in adapter.files[1].tag
    checksum = store.checksum(adapter, adapter.files[1])
    assert checksum is None or checksum.algorithm is not Algorithm.MD5
    assert content(store, adapter) == b"x" * 1000


@pytest.mark.parametrize(
    ("query", "payers"), [("", {None}), ("?requester_pays=true", {"requester"})]
)
def test_the_requester_pays_where_asked_to(s3: str, query: str, payers: set[str | None]) -> None:
    client = boto3.client("s3")
    for name in (CONFIG, WEIGHTS):
        client.put_object(Bucket="kinds", Key=f"paid/a/{name}", Body=b"{}")
    with fault_proxy(s3) as proxy, environment({"AWS_ENDPOINT_URL": proxy.url}):
        store = open_store(f"s3://kinds/paid{query}")
        assert store.url == "s3://kinds/paid"
        adapter = store.list()["a"]
        content(store, found(store))
        store.checksum(adapter, adapter.files[0])
        assert proxy.payers == payers


@pytest.mark.parametrize("query", ["requester_pays=yes", "requester_pays", "payer=me"])
def test_what_is_not_known_of_an_s3_url_is_refused(query: str) -> None:
    with pytest.raises(StoreError, match=r"write \?requester_pays=true, or nothing"):
        open_store(f"s3://kinds/x?{query}")


# A web server.


@pytest.mark.parametrize("tags", ["weak", "none"])
def test_without_a_strong_tag_the_time_of_change_counts(tmp_path: Path, tags: str) -> None:
    for name in ("one", "two"):
        write_adapter(tmp_path / name / "a")
        for path in (tmp_path / name / "a").iterdir():
            os.utime(path, (1_000_000_000, 1_000_000_000))
    with file_server(tmp_path) as server:
        server.tags = tags
        store = open_store(f"{server.url}/one")
        adapter = found(store)
        assert content(store, adapter) == (tmp_path / "one" / "a" / WEIGHTS).read_bytes()
        other = found(open_store(f"{server.url}/two"))
        assert other.version != adapter.version, "two servers' tags never collide"
        write_adapter(tmp_path / "one" / "a", 5)
        assert found(store).version != adapter.version
        with pytest.raises(AdapterGoneError):
            content(store, adapter)


# The hub.


def test_the_token_goes_to_the_hub_and_nowhere_else(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    with hub_server(tmp_path) as (hub, storage):
        with environment({"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"}):
            store = open_store(f"hf://{REPO}")
            content(store, found(store))
            content(store, found(store), CONFIG)
        assert set(hub.tokens) == {"Bearer hf_secret"}
        assert storage.tokens == [None]


def test_files_of_the_hub_come_through_the_environments_proxy(tmp_path: Path) -> None:
    seen: list[tuple[str, str | None]] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("proxy-authorization")))
            headers = {name: value for name, value in self.headers.items() if name != "Host"}
            answer = urllib3.request(
                "GET", self.path, headers=headers, redirect=False, retries=False
            )
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.data)))
            self.end_headers()
            self.wfile.write(answer.data)

        def log_message(self, *_: object) -> None:
            pass

    write_adapter(tmp_path / "a")
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    address = f"http://me:p%40ss@127.0.0.1:{proxy.server_port}"
    try:
        with (
            hub_server(tmp_path) as (hub, storage),
            environment({"HF_ENDPOINT": hub.url, "HTTP_PROXY": address, "NO_PROXY": ""}),
        ):
            store = open_store(f"hf://{REPO}")
            assert content(store, found(store)) == (tmp_path / "a" / WEIGHTS).read_bytes()
            through = [path for path, key in seen if key == "Basic bWU6cEBzcw=="]
            assert [path for path in through if "/resolve/" in path]
            assert [path for path in through if path.startswith(storage.url)]
    finally:
        proxy.shutdown()
        proxy.server_close()


def test_a_repository_that_is_one_adapter_is_a_store_of_one(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    write_adapter(tmp_path / "checkpoint-100")
    with hub_server(tmp_path) as (hub, _), environment({"HF_ENDPOINT": hub.url}):
        store = open_store(f"hf://{REPO}")
        assert store.find("checkpoint-100") is None
        assert list(store.list()) == ["adapters"]
        adapter = found(store, "adapters")
        assert content(store, adapter) == (tmp_path / WEIGHTS).read_bytes()
        assert list(open_store(f"hf://{REPO}/checkpoint-100").list()) == ["checkpoint-100"]


def test_a_revision_that_is_not_there_says_so(tmp_path: Path) -> None:
    with hub_server(tmp_path) as (hub, _), environment({"HF_ENDPOINT": hub.url}):
        with pytest.raises(StoreError, match="access denied, or no such repository") as error:
            open_store(f"hf://{REPO}@v9").list()
        assert not error.value.passing


# Addresses, and packages.


@pytest.mark.parametrize(
    ("path", "is_fine"),
    [
        ("adapters", True),
        ("/srv/adapters", True),
        ("s3://b1/p/q", True),
        ("s3://b1/p?requester_pays=true", True),
        ("s3://", False),
        ("gs://b_1/p", True),
        ("az://c1/p", True),
        ("az://C1/p", False),
        ("https://files.example:8443/a/b", True),
        ("https://user:pw@files.example/a", False),
        ("https://files.example/a?key=1", False),
        ("http://127.0.0.1:80/a", True),
        ("http://[::1]:80/a", True),
        ("http://localhost/a", True),
        ("http://10.0.0.1/a", False),
        ("http://127.0.0.1.example/a", False),
        ("hf://acme/adapters", True),
        ("hf://acme/adapters/lora/x@v1", True),
        ("hf://acme", False),
        ("ftp://x/y", False),
        ("", False),
    ],
)
def test_addresses(path: str, is_fine: bool) -> None:
    problem = problem_with(path)
    assert (problem is None) is is_fine
    if problem is not None:
        assert "write " in problem
        assert "pw" not in problem
        with pytest.raises(StoreError):
            open_store(path)


@pytest.mark.parametrize(
    ("url", "package", "module"),
    [
        ("gs://bucket/x", "obstore", "router.adapters.objects"),
        ("hf://acme/adapters", "huggingface_hub", "router.adapters.hub"),
    ],
)
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, url: str, package: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(StoreError, match=rf"the package {package}; run `pip install 'lorayard\["):
        open_store(url)
