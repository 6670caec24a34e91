"""The commands of `python -m sim`, one module each: `add(commands)`, `run(arguments, errors)`."""

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001  (argparse has no public name for it)
