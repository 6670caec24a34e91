"""Adapters that have each a place of their own, and how an operator may write it."""

import pytest

from router.adapters.store import AdapterStore, StoreError
from router.lifecycle.sources import Sources


class Nowhere:
    """A store without adapters, at some address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def find(self, name: str) -> None:
        """Nothing is here."""


PLACES = [
    ("/adapters/sql/", "/adapters"),
    ("s3://bucket/sql", "s3://bucket"),
    ("s3://bucket/pre/sql?requester_pays=true", "s3://bucket/pre?requester_pays=true"),
    ("hf://org/sql", "hf://org/sql"),
    ("hf://org/sql@v1.0", "hf://org/sql@v1.0"),
    ("hf://org/repo/all/sql@main", "hf://org/repo/all@main"),
]


@pytest.mark.parametrize(("address", "store"), PLACES)
def test_the_store_of_a_place_is_one_step_above(address: str, store: str) -> None:
    opened: list[str] = []

    def open_(url: str) -> AdapterStore:
        opened.append(url)
        return Nowhere(url)  # type: ignore[return-value]

    sources = Sources(Nowhere("/store"), open_)  # type: ignore[arg-type]
    sources.register({"mine": address})
    assert sources.find("mine") is None
    assert opened == [store]


@pytest.mark.parametrize(
    "address",
    ["sql", "s3://sql", "https://me:secret@host/sql", "ftp://host/sql", "/a/..", "hf://org"],
)
def test_what_is_no_place_is_refused_before_it_is_read(address: str) -> None:
    sources = Sources(Nowhere("/store"), Nowhere)  # type: ignore[arg-type]
    with pytest.raises(StoreError) as error:
        sources.register({"mine": address})
    assert not error.value.passing
    assert "secret" not in str(error.value)
