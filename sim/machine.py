"""The machine that a measurement was made on, in words: figures of one say little of another."""

import os
import platform
from pathlib import Path


def machine() -> str:
    """This machine, in words."""
    name = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{os.cpu_count()} cores of {name}"
