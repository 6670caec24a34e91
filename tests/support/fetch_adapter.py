"""A process that fetches an adapter of a store into a cache: `URL CACHE NAME PART_BYTES [DIE_AT]`.

It prints the folder. With DIE_AT it is killed, as by `kill -9`, just before it changes a name or a
folder for the DIE_AT-th time; 0 lets it live, and prints how many such times there were.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

from router.adapters.cache import AdapterCache
from router.adapters.open import open_store
from router.adapters.space import Space
from router.adapters.transfer import Downloads
from router.adapters.validate import AdapterRules

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.utime", "os.truncate"}


async def main(url: str, root: Path, name: str, part_bytes: int) -> Path:
    store = open_store(url)
    adapter = store.find(name)
    assert adapter is not None
    cache = AdapterCache(
        store,
        root / "base",
        AdapterRules(("tiny",), rank_max=16),
        timeout_s=60,
        max_tries=3,
        downloads=Downloads(4, part_bytes=part_bytes),
        space=Space(root, 2**30),
    )
    cache.prepare()
    return await cache.folder_of(adapter)


if __name__ == "__main__":
    url, root, name, part_bytes, *rest = sys.argv[1:]
    die_at = int(rest[0]) if rest else -1
    changes = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        global changes  # noqa: PLW0603
        if event in CHANGES and str(root) in str(arguments):
            changes += 1
            if changes == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    print(asyncio.run(main(url, Path(root), name, int(part_bytes))))  # noqa: T201
    print(changes)  # noqa: T201
    sys.stdout.flush()
