"""The file of keys while the router runs: read again when it changes, by a process of its own.

Reading ten thousand keys takes YAML two seconds, in which it lets no other thread run: requests would
stand still for as long. So a process is started for it (`python -m router.key_file`), and only what it
found comes here, checked, as one line of JSON. A change is seen by the file's place, time and length,
which cost nothing to ask for; what changes while it is read is being written, and is read a little
later.
"""

import asyncio
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Final

import msgspec
from anyio import CapacityLimiter, to_thread

from router.document import ConfigError
from router.keys import KeyConfig, load_keys

READ_TIMEOUT_S: Final = 60.0
Stamp = tuple[int, ...] | None


class _Found(msgspec.Struct):
    """What the process tells: keys, or why there are none."""

    keys: tuple[KeyConfig, ...] = ()
    error: str | None = None


class KeyFile:
    """One file of keys, whose tenants are among these, and what it was when it was last read."""

    def __init__(self, path: Path, tenants: Collection[str]) -> None:
        self.path = path
        self._tenants = tuple(tenants)
        self._seen: Stamp = None
        self._thread = CapacityLimiter(1)  # its own: a file system that hangs takes none of others

    def read(self) -> tuple[KeyConfig, ...]:
        """What stands in it; blocks. Raises `ConfigError`."""
        self._seen = self._stamp()
        return load_keys(self.path, self._tenants)

    async def read_if_changed(self) -> tuple[KeyConfig, ...] | None:
        """What stands in it, or None while it is as it was, or is being written just now.

        Raises `ConfigError`: once for each change, or as long as nobody can say what stands in it.
        """
        stamp = await self._look()
        if stamp == self._seen:
            return None
        found = await self._read_apart()
        if stamp != await self._look():
            return None
        self._seen = stamp
        if found.error is not None:
            raise ConfigError(found.error)
        return found.keys

    async def _look(self) -> Stamp:
        return await to_thread.run_sync(self._stamp, abandon_on_cancel=True, limiter=self._thread)

    def _stamp(self) -> Stamp:
        """What differs when the file does, also where another was put in its place."""
        try:
            stat = os.stat(self.path)  # noqa: PTH116  (through links: a mounted secret is one)
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_ino, stat.st_dev, stat.st_size)

    async def _read_apart(self) -> _Found:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "router.key_file", str(self.path), *self._tenants),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                told, _ = await process.communicate()
        except TimeoutError:
            raise ConfigError(f"{self.path}: not read after {READ_TIMEOUT_S:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise ConfigError(f"{self.path}: its reader ended with {process.returncode}")
        return msgspec.json.decode(told, type=_Found)


def main() -> None:
    """Read the file that is named, whose tenants follow, and tell what was found."""
    path, *tenants = sys.argv[1:]
    try:
        found = _Found(load_keys(Path(path), tenants))
    except ConfigError as error:
        found = _Found(error=str(error))
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    main()
