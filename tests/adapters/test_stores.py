"""One conformance test over every store."""

from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from adapter_files import write_adapter
from object_store import s3_server, upload

from router.adapters.open import open_store
from router.adapters.s3 import S3Store
from router.adapters.store import AdapterGoneError, AdapterStore, StoreError

pytestmark = pytest.mark.xdist_group("stores")


@pytest.fixture(scope="module", autouse=True)
def _endpoint() -> Iterator[None]:
    with s3_server():
        yield


Place = Callable[[str], AdapterStore]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[AdapterStore, Place]]:
    """A store with adapters, and a way to change the one that is called `a`."""
    folder = tmp_path / "store"
    write_adapter(folder / "a", 1)
    write_adapter(folder / "b.2-x_y", 2)
    write_adapter(folder / "-bad-name", 3)
    write_adapter(folder / "nested" / "deeper", 3)
    (folder / "no-adapter").mkdir()
    (folder / "no-adapter" / "notes.txt").write_text("x")
    if request.param == "local":

        def change_local(seed: str) -> AdapterStore:
            write_adapter(folder / "a", int(seed), lora_alpha=32)
            return store

        store = open_store(str(folder))
        yield store, change_local
        return
    bucket = f"bucket-{abs(hash(str(tmp_path)))}"
    upload(folder, bucket, "some/prefix")

    def change_s3(seed: str) -> AdapterStore:
        changed = write_adapter(tmp_path / "changed" / "a", int(seed), lora_alpha=32).parent
        for path in (changed / "a").iterdir():
            boto3.client("s3").put_object(
                Bucket=bucket, Key=f"some/prefix/a/{path.name}", Body=path.read_bytes()
            )
        return store

    store = open_store(f"s3://{bucket}/some/prefix/")
    yield store, change_s3


def test_lists_what_is_an_adapter_and_nothing_else(place: tuple[AdapterStore, Place]) -> None:
    store, _ = place
    listed = store.list()
    assert list(listed) == ["a", "b.2-x_y"]
    assert listed["a"] == store.find("a")
    assert listed["a"].version != listed["b.2-x_y"].version


@pytest.mark.parametrize("name", ["missing", "no-adapter", "..", "a/../b", "a/", "", "x" * 200])
def test_finds_nothing_under_other_names(place: tuple[AdapterStore, Place], name: str) -> None:
    assert place[0].find(name) is None


def test_fetches_both_files_whole(place: tuple[AdapterStore, Place], tmp_path: Path) -> None:
    store, _ = place
    into = tmp_path / "into"
    into.mkdir()
    adapter = store.find("a")
    assert adapter is not None
    store.fetch(adapter, into, lambda: False)
    expected = write_adapter(tmp_path / "expected", 1)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (into / name).read_bytes() == (expected / name).read_bytes()
    assert len(list(into.iterdir())) == 2


def test_a_change_is_another_version_and_the_old_one_is_gone(
    place: tuple[AdapterStore, Place], tmp_path: Path
) -> None:
    store, change = place
    old = store.find("a")
    assert old is not None
    change("9")
    new = store.find("a")
    assert new is not None
    assert new.version != old.version
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(AdapterGoneError):
        store.fetch(old, into, lambda: False)


def test_a_fetch_stops_when_told(place: tuple[AdapterStore, Place], tmp_path: Path) -> None:
    store, _ = place
    adapter = store.find("a")
    assert adapter is not None
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(StoreError, match="took too long"):
        store.fetch(adapter, into, lambda: True)


def test_a_store_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file or directory"):
        open_store(str(tmp_path / "nowhere")).list()
    with pytest.raises(StoreError, match="no such bucket; check dynamic_lora_loading_path"):
        open_store("s3://no-such-bucket-here/x").list()


def test_more_than_one_page_of_objects() -> None:
    client = boto3.client("s3")
    client.create_bucket(Bucket="large")
    for number in range(25):
        client.put_object(Bucket="large", Key=f"a{number:04d}/adapter_config.json", Body=b"{}")
    assert len(S3Store("s3://large", page_size=10).list()) == 25
