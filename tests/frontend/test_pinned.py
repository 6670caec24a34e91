"""Who names a version of an adapter is answered by that one, or not at all."""

import json

import pytest
from plane import MODEL, always, answer, on_uvloop, plane, post

from router.core.job import AdapterRef, LoadError, LoadFault


@pytest.mark.parametrize(
    ("model", "fault", "status", "lookups"),
    [
        (f"{MODEL}:a", LoadFault.ADAPTER_CHANGED, 200, ["a", "a"]),
        (f"{MODEL}:a@{16 * '1'}", LoadFault.ADAPTER_CHANGED, 404, 2 * [f"a@{16 * '1'}"]),
        (f"{MODEL}:a", LoadFault.ADAPTER_INVALID, 200, ["a"]),
        (f"{MODEL}:a@{16 * '1'}", LoadFault.ADAPTER_INVALID, 400, [f"a@{16 * '1'}"]),
    ],
)
@on_uvloop
async def test_what_cannot_be_loaded(
    model: str, fault: LoadFault, status: int, lookups: list[str]
) -> None:
    async with plane(always(answer())) as made:
        load = made.pool.load
        made.model.instead = AdapterRef(MODEL, "a", 16 * "2")

        async def fails_once(*what: object) -> int:
            made.pool.load = load  # type: ignore[method-assign]
            raise LoadError(fault, "it is not to be had")

        made.pool.load = fails_once  # type: ignore[method-assign,assignment]
        reply = await made.ask(post(json.dumps({"model": model}).encode()))
        assert reply.status == status, reply.body
        assert made.model.lookups == lookups
