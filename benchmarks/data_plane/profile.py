"""Where the router's time goes: sampled by py-spy while a case runs, as text.

py-spy is a wheel in the peers' environment; it stops the router for each sample, so no figure is taken
of a router that is being sampled.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.data_plane.cases import Case, Round, Sizes, measure, running
from benchmarks.data_plane.contenders import lorayard
from benchmarks.data_plane.peers import ENVIRONMENT, installed
from benchmarks.data_plane.processes import ClientProcess, Cores, started

SAMPLES_PER_S: Final = 200
SHOWN: Final = 60
FILES_SHOWN: Final = 20
WAITS: Final = ("Condition.wait ", "_worker (concurrent/")  # threads that wait for work
CASES: Final = (Case.ANSWERS, Case.TOKENS)


def write(
    path: Path,
    engines: Sequence[int],
    client: ClientProcess,
    cores: Cores,
    sizes: Sizes,
    say: Callable[[str], None],
) -> None:
    """Profile this router in each of `CASES`, and write where it was found. Raises `Absent`."""
    version = installed("py-spy", "0.4.3")
    parts = [
        f"Where the router was found, by py-spy {version}, {SAMPLES_PER_S} samples a second: the\n"
        "share of samples in a file's code itself; then in a function itself, and in it or in what it\n"
        "calls. What is compiled by mypyc is in __native_lorayard.c, the interpreter in libpython,\n"
        "uvloop in loop.c, libuv in its own files, the kernel behind libc's write and read. Threads\n"
        "that wait for work are left out. py-spy stops the router, so waiting is dearer than it is."
    ]
    with tempfile.TemporaryDirectory(prefix="lorayard-profile-") as name:
        folder = Path(name)
        for case in CASES:
            say(f"profile: {case}")
            raw = folder / f"{case}.txt"
            with running(lorayard(), engines, cores, folder) as target:
                measure(target, client, [case], sizes, Round(figures={}, lost=[]))  # warm
                command = [
                    *(str(ENVIRONMENT / "bin" / "py-spy"), "record", "--pid", str(target.pid)),
                    *("--rate", str(SAMPLES_PER_S), "--format", "raw", "--function"),
                    "--native",
                    *("--duration", "600", "--output", str(raw)),
                ]
                with started(command, cores.others, folder / "py-spy.log") as spy:
                    measure(target, client, [case], sizes, Round(figures={}, lost=[]))
                    spy.send_signal(2)
                    spy.wait(30)
            log = (folder / "py-spy.log").read_text(errors="replace")
            text = raw.read_text() if raw.exists() else ""
            parts.append(f"{case}\n\n{summary(text.splitlines()) if text else log}")
    path.write_text("\n\n".join(parts) + "\n")


def summary(lines: Iterable[str]) -> str:
    """The most frequent functions of py-spy's raw format: `frame;frame;frame count` a line."""
    itself: Counter[str] = Counter()
    within: Counter[str] = Counter()
    files: Counter[str] = Counter()
    total = 0
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if any(frame.startswith(WAITS) for frame in frames):
            continue
        total += int(count)
        place = frames[-1].rpartition(" (")[2].rstrip(")")
        files[place.rpartition("/")[2].partition(":")[0]] += int(count)
        itself[frames[-1]] += int(count)
        for frame in dict.fromkeys(frames):
            within[frame] += int(count)
    if not total:
        return "no samples"
    rows = [f"{n / total:>7.1%}  {file}" for file, n in files.most_common(FILES_SHOWN)]
    rows += ["", f"{'itself':>7} {'within':>7}"]
    rows += [
        f"{itself[frame] / total:>7.1%} {within[frame] / total:>7.1%}  {frame}"
        for frame, _ in itself.most_common(SHOWN)
    ]
    rows += ["", f"{'within':>15}"]
    rows += [f"{n / total:>15.1%}  {frame}" for frame, n in within.most_common(SHOWN)]
    return "\n".join(rows)
