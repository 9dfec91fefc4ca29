"""The command line: ``em-lightning ls | cp | run | audit | kernels``, the same as ``python -m em_lightning.cli``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from em_lightning._version import __version__
from em_lightning.cli.audit import load_model, print_audit
from em_lightning.cli.folders import UsageError, config_of, copy, docstring, folder_of, own_error, recipes, variants_of
from em_lightning.cli.ranks import end_with_first_rank, leave_process_group
from em_lightning.cli.run import recipe_cli, run
from em_lightning.cli.tables import KINDS, parts_of, print_parts, print_recipes

__all__ = [
    "KINDS",
    "UsageError",
    "config_of",
    "copy",
    "docstring",
    "folder_of",
    "load_model",
    "main",
    "parts_of",
    "recipe_cli",
    "recipes",
    "run",
    "variants_of",
]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("em-lightning", description="EM inside neural networks.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    command("ls", "list the recipes")
    copier = command("cp", "copy a recipe and its configs, to edit and run")
    copier.add_argument("recipe", help="as em-lightning ls names it")
    copier.add_argument(
        "folder", nargs="?", default=".", type=Path, help="where to, made if it is not there (default: here)"
    )
    runner = command("run", "run a recipe; em-lightning run RECIPE --help tells its arguments")
    runner.add_argument("recipe", help="its name, or the path of a copy of its script")
    runner.add_argument("arguments", nargs=argparse.REMAINDER, help="for its LightningCLI: --trainer.max_epochs=3")
    auditor = command("audit", "tell where EM lives in a model, layer by layer")
    auditor.add_argument("model", help="package.module:NAME or path/to/file.py:NAME, made without arguments")
    auditor.add_argument("--input", required=True, help="shape of a random input, for instance 32,784")
    auditor.add_argument("--ckpt_path", help="checkpoint for NAME, a LightningModule class, to load")
    lister = command("kernels", "list the kernels, or the other parts that a name stands for")
    lister.add_argument("kind", nargs="?", default="kernels", choices=KINDS, help=", ".join(KINDS))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 for success, 2 for a mistake in what was asked for."""
    parsed = _parser().parse_args(argv)
    try:
        if parsed.command == "ls":
            print_recipes()
        elif parsed.command == "cp":
            for path in copy(parsed.recipe, parsed.folder):
                print(path)
        elif parsed.command == "audit":
            print_audit(parsed.model, parsed.input, parsed.ckpt_path)
        elif parsed.command == "kernels":
            print_parts(parsed.kind)
        else:
            end_with_first_rank()
            run(parsed.recipe, parsed.arguments)
            leave_process_group()
    except (UsageError, ValueError, TypeError, OSError) as error:
        told = own_error(error)
        if told is None:
            raise
        print(f"em-lightning: {told}", file=sys.stderr)
        return 2
    return 0
