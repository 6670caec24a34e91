"""The transfer's parts: resumed from what is on disk, verified, paced, and bounded in number."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.adapters.checksum import Algorithm, Checksum, hasher, read_sums
from router.adapters.journal import Journal
from router.adapters.pace import MIB, Bandwidth, Deadline
from router.adapters.store import StoredAdapter, StoredFile, StoreError, stored_adapter
from router.adapters.transfer import BadContentError, Downloads, journal_of, reserve

CONFIG, WEIGHTS, SUMS = "adapter_config.json", "adapter_model.safetensors", "SHA256SUMS"


class Memory:
    """A store of one adapter in memory, which notes what is read of it."""

    url = "memory"

    def __init__(self, files: dict[str, bytes], algorithm: Algorithm | None = None) -> None:
        self.files = files
        self.algorithm = algorithm
        self.read_bytes = 0
        self.fails_after: int | None = None
        self.most_at_once = 0
        self.tries = 0
        self._at_once = 0
        self._lock = threading.Lock()

    @property
    def adapter(self) -> StoredAdapter:
        files = [StoredFile(name, len(data), "t") for name, data in self.files.items()]
        adapter = stored_adapter("a", files)
        assert adapter is not None
        return adapter

    def list(self) -> dict[str, StoredAdapter]:
        return {"a": self.adapter}

    def find(self, name: str) -> StoredAdapter | None:
        return self.list().get(name)

    def read(
        self, adapter: StoredAdapter, file: StoredFile, start: int, stop: int
    ) -> Iterator[bytes]:
        with self._lock:
            self.tries += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            for position in range(start, stop, 10):
                if self.fails_after is not None and self.read_bytes >= self.fails_after:
                    raise StoreError("down", passing=False)
                piece = self.files[file.name][position : min(position + 10, stop)]
                self.read_bytes += len(piece)
                yield piece
        finally:
            with self._lock:
                self._at_once -= 1

    def checksum(self, adapter: StoredAdapter, file: StoredFile) -> Checksum | None:
        return checksum(self.algorithm, self.files[file.name]) if self.algorithm else None


def checksum(algorithm: Algorithm, data: bytes) -> Checksum:
    one = hasher(algorithm, len(data))
    one.update(data)
    return Checksum(algorithm, one.hexdigest())


def fetch(store: Memory, folder: Path, *, connections: int = 4, timeout_s: float = 30) -> None:
    reserve(store.adapter, folder)
    downloads = Downloads(connections, part_bytes=100)
    downloads.fetch(store, store.adapter, folder, Deadline(timeout_s), max_tries=3)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == store.files


def files_of(size: int) -> dict[str, bytes]:
    return {CONFIG: b"{}", WEIGHTS: bytes(number % 251 for number in range(size))}


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 1500),
    stops=st.lists(st.integers(0, 1500), max_size=4),
    connections=st.integers(1, 5),
    damage=st.lists(st.integers(0, 1500), max_size=3),
    algorithm=st.sampled_from([None, *Algorithm]),
)
def test_however_it_is_cut_off_it_ends_whole(
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    stops: list[int],
    connections: int,
    damage: list[int],
    algorithm: Algorithm | None,
) -> None:
    """Cut off any number of times, and with what is on disk damaged meanwhile."""
    folder = tmp_path_factory.mktemp("transfer") / "a"
    store = Memory(files_of(size), algorithm)
    for stop in stops:
        store.fails_after = store.read_bytes + stop
        try:
            fetch(store, folder, connections=connections)
        except StoreError as error:
            assert str(error) == "down"  # noqa: PT017
    for position in damage:
        with (
            (folder.parent / "a" / WEIGHTS).open("r+b")
            if folder.exists()
            else (folder.parent / "nothing").open("w+b") as file
        ):
            file.seek(min(position, max(0, size - 1)))
            file.write(b"\xff" if size else b"")
    store.fails_after = None
    fetch(store, folder, connections=connections)
    assert store.most_at_once <= connections


def test_what_is_done_is_not_read_again(tmp_path: Path) -> None:
    store = Memory(files_of(1000))
    fetch(store, tmp_path / "a")
    assert store.read_bytes == 1002
    fetch(store, tmp_path / "a")
    assert store.read_bytes == 1002


@given(cut=st.integers(0, 400), junk=st.binary(max_size=30))
def test_any_journal_is_read(
    tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes
) -> None:
    folder = tmp_path_factory.mktemp("journal") / "a"
    store = Memory(files_of(700))
    fetch(store, folder)
    path = journal_of(folder)
    path.write_bytes(path.read_bytes()[:cut] + junk)
    fetch(store, folder)


def test_a_journal_of_another_version_counts_for_nothing(tmp_path: Path) -> None:
    store = Memory(files_of(700))
    fetch(store, tmp_path / "a")
    other = StoredAdapter("a", "0" * 16, "", store.adapter.files)
    journal = Journal(journal_of(tmp_path / "a"), other, other.transferred)
    assert journal.is_empty
    journal.close()


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_every_kind_of_checksum_finds_a_changed_byte(tmp_path: Path, algorithm: Algorithm) -> None:
    store = Memory(files_of(700), algorithm)
    right = store.checksum(store.adapter, store.adapter.files[1])
    store.files[WEIGHTS] = b"\xff" + store.files[WEIGHTS][1:]
    is_ = store.checksum(store.adapter, store.adapter.files[1])
    assert right is not None
    assert is_ is not None
    store.checksum = lambda adapter, file: right  # type: ignore[method-assign]
    with pytest.raises(BadContentError) as error:
        fetch(store, tmp_path / "a")
    assert f"has the {algorithm} {is_.value}, but the store says {right.value}" in str(error.value)
    assert store.read_bytes >= 2 * 700, "it was fetched afresh, once"


# The check values of the CRC catalogue, and of `git hash-object`.
KNOWN = [
    (Algorithm.CRC32, "cbf43926"),
    (Algorithm.CRC32C, "e3069283"),
    (Algorithm.CRC64NVME, "ae8b14860a799888"),
    (Algorithm.MD5, "25f9e794323b453885f5181f1b624d0b"),
    (Algorithm.GIT_BLOB, "e2e107ac61ac259b87c544f6e7a4eb03422c6c21"),
]


@pytest.mark.parametrize(("algorithm", "value"), KNOWN)
def test_checksums_are_the_known_ones(algorithm: Algorithm, value: str) -> None:
    assert checksum(algorithm, b"123456789").value == value


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        (b"not a line\n", "line 1 is not `DIGEST  FILE` as `sha256sum FILE` writes it"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"0" * 64 + b"  adapter_config.json\n", "but SHA256SUMS says 0000"),
        (b"x" * 70_000, "is larger than 65,536 bytes"),
    ],
)
def test_sums_that_do_not_hold_are_told(tmp_path: Path, sums: bytes, message: str) -> None:
    store = Memory({**files_of(300), SUMS: sums})
    with pytest.raises(BadContentError, match="a/") as error:
        fetch(store, tmp_path / "a")
    assert message in str(error.value)


def test_sums_as_sha256sum_writes_them_are_read(tmp_path: Path) -> None:
    files = files_of(300)
    one = {name: checksum(Algorithm.SHA256, data) for name, data in files.items()}
    lines = f"{one[CONFIG].value}  {CONFIG}\n\n{one[WEIGHTS].value.upper()} *./{WEIGHTS}\n"
    assert read_sums(lines.encode()) == one
    fetch(Memory({**files, SUMS: lines.encode()}), tmp_path / "a")


def test_bandwidth_is_shared_by_all_who_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bandwidth = Bandwidth(1.0)
    assert bandwidth.take(MIB // 4) == 0, "a burst of a quarter of a second is let through"
    waits = [bandwidth.take(MIB) for _ in range(3)]
    assert waits == pytest.approx([1, 2, 3])
    now += 10
    assert bandwidth.take(MIB // 4) == 0, "what was not used is not saved up for longer"
    assert bandwidth.take(MIB) == pytest.approx(1)
    assert Bandwidth(None).take(2**40) == 0


def test_a_transfer_waits_for_its_share_and_not_beyond_the_deadline(tmp_path: Path) -> None:
    store = Memory(files_of(1000))
    reserve(store.adapter, tmp_path / "a")
    downloads = Downloads(2, 100 / MIB, part_bytes=100)
    with pytest.raises(StoreError, match=r"not here after 0\.3 s \(download_timeout_s\)"):
        downloads.fetch(store, store.adapter, tmp_path / "a", Deadline(0.3), max_tries=1)
    assert store.read_bytes < 300


def test_a_store_that_asks_to_wait_keeps_no_other_waiting(tmp_path: Path) -> None:
    """One connection for both: the pause of the one is the other's time."""

    class Busy(Memory):
        def read(
            self, adapter: StoredAdapter, file: StoredFile, start: int, stop: int
        ) -> Iterator[bytes]:
            asked.set()
            raise StoreError("slow down", retry_after_s=20)

        def checksum(self, adapter: StoredAdapter, file: StoredFile) -> Checksum | None:
            asked.set()
            raise StoreError("slow down", retry_after_s=20)

    asked = threading.Event()
    files = {CONFIG: b"{}", WEIGHTS: b"1" * 100}
    downloads = Downloads(1)
    deadline = Deadline(30)

    def fetch(store: Memory, deadline: Deadline) -> None:
        folder = tmp_path / type(store).__name__
        reserve(store.adapter, folder)
        downloads.fetch(store, store.adapter, folder, deadline, max_tries=9)

    def busy() -> None:
        with pytest.raises(StoreError):
            fetch(Busy(files), deadline)

    waiting = threading.Thread(target=busy)
    waiting.start()
    assert asked.wait(10)
    fetch(Memory(files), Deadline(10))
    deadline.give_up()
    waiting.join(10)
