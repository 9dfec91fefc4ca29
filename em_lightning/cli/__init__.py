"""The command line ``em-lightning ls | cp | run | audit``, the same as ``python -m em_lightning.cli``."""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from em_lightning._version import __version__
from em_lightning.cli.audit import print_audit
from em_lightning.cli.recipes import Recipe, copy, print_recipes
from em_lightning.cli.run import run
from em_lightning.extras import ExtraChecker

__all__ = ["Recipe", "main"]

# Errors of a write that is not permitted or does not fit.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("em-lightning", description="EM inside neural networks.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    command("ls", "list the recipes")
    copier = command("cp", "copy a recipe and its configs")
    copier.add_argument("recipe", help="name of a recipe, see em-lightning ls")
    copier.add_argument("folder", nargs="?", default=".", type=Path, help="created if needed (default: this folder)")
    runner = command("run", "run a recipe; em-lightning run RECIPE --help lists its arguments")
    runner.add_argument("recipe", help="name of a recipe, or path of a copy of its script")
    runner.add_argument("arguments", nargs=argparse.REMAINDER, help="of its LightningCLI: --trainer.max_epochs=3")
    auditor = command("audit", "list the layers of a model in which EM takes place")
    auditor.add_argument("model", help="package.module:NAME or path/to/file.py:NAME of a module, class or function")
    source = auditor.add_mutually_exclusive_group(required=True)
    form = "[NAME=]SHAPE[:LIMIT]"
    shapes = "random input: 32,784 for numbers, ids=8,128:50257 for integers below 50257; one per argument of forward"
    source.add_argument("--input", action="append", metavar=form, help=shapes)
    source.add_argument("--batch", metavar="FUNCTION", help="makes a batch; a LightningModule runs its training_step")
    auditor.add_argument("--init_args", default="{}", help="arguments of NAME, for instance '{width: 8, depth: 2}'")
    auditor.add_argument("--ckpt_path", help="checkpoint to load")
    trust = "false loads a checkpoint that you trust, with hyperparameters of any class"
    auditor.add_argument("--weights_only", choices=["true", "false"], default="true", help=trust)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 for success, 2 for an error whose message needs no traceback."""
    parsed = _parser().parse_args(argv)
    try:
        if parsed.command == "ls":
            print_recipes()
        elif parsed.command == "cp":
            print(*copy(parsed.recipe, parsed.folder), sep="\n")
        elif parsed.command == "audit":
            print_audit(parsed, " ".join(sys.argv[1:] if argv is None else argv))
        else:
            ExtraChecker.find_spec("em_lightning.cli.recipe")  # raises ImportError if Lightning is not installed
            run(parsed.recipe, parsed.arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        message = str(_raised_by_this_package(error) or "")
        if not message and isinstance(error, OSError) and error.errno in _UNWRITABLE:
            option = " with --trainer.logger.save_dir" if parsed.command == "run" else ""
            message = f"{error}: free disk space, or write to another folder{option}"
        if not message:
            raise
        print(f"em-lightning: {message}", file=sys.stderr)
        return 2
    finally:
        dist = sys.modules.get("torch.distributed")
        if parsed.command == "run" and dist is not None and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # an open one may abort the process (pytorch/pytorch#190489)
    return 0


def _raised_by_this_package(error: BaseException | None) -> BaseException | None:
    """Return the first error of the chain that a ``raise`` of this package raised: its message needs no traceback."""
    package = Path(__file__).parents[1]
    while error is not None:
        for frame in traceback.extract_tb(error.__traceback__)[-1:]:  # the frame that raised, if there is a traceback
            if Path(frame.filename).is_relative_to(package) and (frame.line or "").startswith("raise "):
                return error
        error = error.__cause__ or error.__context__
    return None
