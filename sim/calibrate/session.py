"""What has been seen so far, on disk: a measurement of many minutes survives an interruption.

The file's first line says what is measured (engine, design); a second run with the same answer goes on
where the first one ended, another one is refused rather than mixed.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine_worker.protocol import Info
from sim.calibrate.measure import Seen
from sim.errors import UserError


class SessionError(UserError):
    """The file holds another measurement. The message says what to do."""


class Head(msgspec.Struct, frozen=True):
    """What is measured: a change of any of it makes two measurements incomparable."""

    info: Info
    rounds: int
    quick: bool
    neighbours: int
    adapter: str = ""
    design: str = ""  # a digest of its points: they are known by their number


class _Line(msgspec.Struct, frozen=True):
    point: int
    seen: list[Seen]


class Session:
    """The points that are done, by number, and what was seen at each."""

    def __init__(self, path: Path, head: Head) -> None:
        self.path = path
        self.done: dict[int, list[Seen]] = {}
        # A worker that was started again has another process id and is the same engine.
        head = msgspec.structs.replace(head, info=msgspec.structs.replace(head.info, pid=0))
        if not path.exists():
            path.write_bytes(msgspec.json.encode(head) + b"\n")
            return
        lines = path.read_bytes().split(b"\n")
        try:
            before = msgspec.json.decode(lines[0], type=Head)
        except msgspec.DecodeError:
            raise SessionError(
                f"{path} is no measurement in progress; name another --out"
            ) from None
        if before != head:
            raise SessionError(
                f"{path} holds a measurement of another engine or design; remove it to begin anew"
            )
        for line in lines[1:]:
            try:
                entry = msgspec.json.decode(line, type=_Line)
            except msgspec.DecodeError:  # the last line, cut short by the interruption, or empty
                continue
            self.done[entry.point] = entry.seen
        if lines[-1]:
            with path.open("ab") as file:
                file.write(b"\n")

    def add(self, point: int, seen: Sequence[Seen]) -> None:
        """Note a point, on disk before anything else."""
        self.done[point] = list(seen)
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(_Line(point, list(seen))) + b"\n")

    @property
    def seen(self) -> list[Seen]:
        """All that was seen, in the order of the design."""
        return [one for number in sorted(self.done) for one in self.done[number]]
