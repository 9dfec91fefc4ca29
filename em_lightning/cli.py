"""The command line: ``em-lightning ls | run | audit``, the same as ``python -m em_lightning.cli``."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from em_lightning.catalog import UsageError, folder_of, load_recipe, own_error, recipes
from em_lightning.grid import run_table, table_of

# What Lightning and PyTorch say about their own insides, or about loaders whose items are made in a millisecond.
_NOISE = (
    ".*does not have many workers.*",
    ".*number of training batches.*smaller than the logging interval.*",
    ".*LightningCLI's args parameter is intended to run from within Python.*",
    ".*isinstance.treespec, LeafSpec.* is deprecated.*",
    ".*torch.jit.script. is.*deprecated.*",
    ".*dirpath has changed.*",
)

_UNKNOWN_KEY = (
    r"unrecognized arguments: (?:--)?([\w.]+)",
    r"Group '([\w.]+)' does not accept (?:option|nested key) '([\w.]+)'",
    r"Parser key \"([\w.]+)\".*Option '([\w.]+)' is not accepted",
)


def summary(path: Path) -> str:
    """Return the first line of a recipe's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0]


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def run(name: str, args: Sequence[str]) -> None:
    """Run a recipe with the arguments of its LightningCLI.

    ``--config NAME`` also takes the name of one of the recipe's variants; ``--seeds 0,1,2`` runs it once a seed, in
    processes side by side where cores allow (``--jobs`` of them), and combines their tables. A variant that is a
    published table runs all of its rows and seeds so, and continues where it stopped.

    Raises:
        UsageError: there is no such recipe, or an argument is wrong.
    """
    known = recipes()
    if name not in known:
        raise UsageError(f"unknown recipe {name!r}{_nearest(name, list(known))} Known: {', '.join(known)}")
    args = _with_variant(name, list(args))
    seeds, args = _take_numbers("seeds", args)
    jobs, args = _take_numbers("jobs", args)
    table = table_of(args)
    if table is not None:
        return run_table(name, args, table, seeds, jobs[0] if jobs else None)
    if seeds:
        return _run_seeds(name, args, seeds, jobs[0] if jobs else None)
    load_recipe(name).main(args)


def _with_variant(name: str, args: list[str]) -> list[str]:
    """Replace the name of a variant behind ``--config`` by its path."""
    variants = {path.stem: path for path in sorted((folder_of("configs") / name).glob("*.yaml"))}
    resolved = []
    for before, arg in zip(["", *args], args, strict=False):
        flag, equals, value = arg.partition("=")
        if before in ("--config", "-c"):
            flag, equals, value = "", "", arg
        elif flag not in ("--config", "-c") or not equals:
            resolved.append(arg)
            continue
        if not Path(value).is_file():
            if value not in variants:
                raise UsageError(
                    f"--config={value!r} is neither a file nor a variant of {name}"
                    f"{_nearest(value, list(variants))} Variants: {', '.join(variants) or 'none'}"
                )
            value = str(variants[value])
        resolved.append(f"{flag}{equals}{value}")
    return resolved


def _take_numbers(flag: str, args: list[str]) -> tuple[list[int], list[str]]:
    """Take ``--flag=0,1,2``, or ``--flag 0,1,2``, out of the arguments."""
    joined = [arg for arg in args if arg.partition("=")[0] == f"--{flag}"]
    if not joined:
        return [], args
    place = args.index(joined[0])
    value = args[place].partition("=")[2] if "=" in args[place] else "".join(args[place + 1 : place + 2])
    rest = args[:place] + args[place + (1 if "=" in args[place] else 2) :]
    if not re.fullmatch(r"\d+(,\d+)*", value):
        raise UsageError(f"--{flag}={value!r} is no list of numbers; write for instance --{flag}=0,1,2")
    return [int(number) for number in value.split(",")], rest


def _run_seeds(name: str, args: list[str], seeds: list[int], jobs: int | None) -> None:
    """Run each seed in a process of its own, as many at a time as there are cores, and write their combined table."""
    from rich.progress import track

    from em_lightning.results import combine, markdown_table

    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path("lightning_logs") / name
    cores = os.cpu_count() or 1
    # Processes of one seed talk to each other over a port and share the cores as it is.
    at_once = 1 if any("strategy" in arg or "devices" in arg for arg in args) else min(jobs or cores, len(seeds))
    threads = {} if at_once == 1 else {"OMP_NUM_THREADS": str(max(cores // at_once, 1))}

    def run_seed(seed: int) -> Path:
        version = f"{stamp}-seed{seed}"
        target = folder / version
        target.mkdir(parents=True)
        options = [f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.logger.version={version}"]
        command = [sys.executable, "-m", "em_lightning.cli", "run", name, *args, *options]
        with open(target / "output.txt", "w", encoding="utf-8") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **threads})
        if done.returncode:
            lines = (target / "output.txt").read_text(encoding="utf-8").strip().splitlines()
            raise UsageError(f"seed {seed} ended with exit code {done.returncode}: {lines[-1]} ({target}/output.txt)")
        return target / "results.json"

    with ThreadPoolExecutor(at_once) as pool:
        paths = list(track(pool.map(run_seed, seeds), f"seeds, {at_once} at a time", total=len(seeds)))
    text = (
        f"# {name}, seeds {', '.join(map(str, seeds))}: mean ± standard deviation\n\n{markdown_table(combine(paths))}\n"
    )
    target = folder / f"{stamp}-seeds"
    target.mkdir(parents=True)
    (target / "results.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nWritten to {target}")


def recipe_cli(
    model: type,
    data: type,
    name: str,
    args: Sequence[str],
    subclass_data: bool = True,
    subclass_model: bool = False,
    links: Sequence[str] = (),
) -> Any:
    """Return a LightningCLI with the recipe's default config, after it has instantiated what the arguments ask for.

    Args:
        model: the LightningModule.
        data: the LightningDataModule, or the base class of those that may be chosen.
        name: of the recipe: its default config is ``configs/<name>.yaml``.
        args: of the command line.
        subclass_data: whether ``--data`` names a subclass.
        subclass_model: whether ``--model`` names a subclass.
        links: arguments of the model that are attributes of the data, such as ``"num_features"``.

    Raises:
        UsageError: an argument is unknown or has a wrong value.
    """
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    keys: list[str] = []

    class RecipeCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to resume from")
            keys.extend(option.lstrip("-") for action in parser._actions for option in action.option_strings)
            for group, base in (("data", data), ("model", model)):
                keys.extend(f"{group}.{name}" for cls in [base, *base.__subclasses__()] for name in parameters_of(cls))
            for link in links:
                target = f"model.init_args.{link}" if subclass_model else f"model.{link}"
                parser.link_arguments(f"data.{link}", target, apply_on="instantiate")

    for words in _NOISE:
        warnings.filterwarnings("ignore", words)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
    options = {
        "allow_abbrev": False,
        "exit_on_error": False,
        "default_config_files": [str(folder_of("configs") / f"{name}.yaml")],
        "prog": f"em-lightning run {name}",
    }
    try:
        return RecipeCLI(
            model,
            data,
            subclass_mode_model=subclass_model,
            subclass_mode_data=subclass_data,
            run=False,
            args=list(args),
            parser_kwargs=options,
            save_config_kwargs={"overwrite": True},
        )
    except ArgumentError as error:
        raise UsageError(_shorten(str(error), keys)) from error


def parameters_of(cls: type) -> list[str]:
    """Return the names of the constructor's arguments of a class and those before it."""
    names = {name for base in cls.__mro__ if "__init__" in vars(base) for name in inspect.signature(base).parameters}
    return sorted(names)


def _shorten(message: str, keys: Sequence[str]) -> str:
    """Return a parser's complaint on one line, with the valid key that is nearest to an unknown one."""
    line = re.sub(r"\s+", " ", message).strip()
    for pattern in _UNKNOWN_KEY:
        found = re.search(pattern, line)
        if found:
            key = ".".join(found.groups())
            return f"unknown key {key!r}{_nearest(key, keys)}"
    line = re.sub(r'Parser key "([\w.]+)":', r"\1:", line)
    line = re.sub(r"- Expected a path but .*? either not accessible or invalid - ", "", line)
    line = re.sub(r"Expected a dot import path string: (\w+)", r"there is no class \1 here", line)
    # Of the complaints of a union the first is about what was given, the others about what was not meant.
    return re.sub(r"Does not validate against any of the Union subtypes.*?Errors: - (.*?) - Expected.*", r"\1", line)


def load_model(target: str, checkpoint: str | None = None) -> Any:
    """Return the model that ``package.module:NAME`` or ``path/to/file.py:NAME`` stands for.

    NAME is a module, or a class or function that makes one without arguments; with a checkpoint it is a
    LightningModule class, which loads it.

    Raises:
        UsageError: there is no such file, module or name, or it makes no model.
    """
    import torch

    place, colon, name = target.rpartition(":")
    if not colon:
        raise UsageError(f"{target!r} names no model; write package.module:NAME or path/to/file.py:NAME")
    try:
        if place.endswith(".py"):
            sys.path.insert(0, str(Path(place).resolve().parent))
            place = Path(place).stem
        else:
            sys.path.insert(0, str(Path.cwd()))
        made = getattr(importlib.import_module(place), name)
    except ImportError as error:
        raise UsageError(f"{target!r} cannot be imported: {error}") from error
    except AttributeError as error:
        raise UsageError(f"{place} has no {name!r}; check the name behind the colon") from error
    if checkpoint is not None:
        made = made.load_from_checkpoint(checkpoint, map_location="cpu")
    elif not isinstance(made, torch.nn.Module):
        try:
            made = made()
        except TypeError as error:
            raise UsageError(
                f"{target!r} cannot be made without arguments ({error}); name a function that can"
            ) from error
    if not isinstance(made, torch.nn.Module):
        raise UsageError(f"{target!r} is a {type(made).__name__} and no torch.nn.Module")
    return made


def _audit(target: str, shape: str, checkpoint: str | None) -> None:
    import torch

    from em_lightning.scope import audit

    if not re.fullmatch(r"\d+(,\d+)*", shape):
        raise UsageError(f"--input={shape!r} is no shape; write for instance --input=32,784")
    batch = torch.randn(*map(int, shape.split(",")), generator=torch.Generator().manual_seed(0))
    model = load_model(target, checkpoint)
    # A random input has no labels, so only the forward is run, also where there is a training step.
    print(audit(model, batch, run=lambda: model(batch)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 for success, 2 for a mistake in what was asked for."""
    parser = argparse.ArgumentParser("em-lightning", description="EM inside neural networks.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("ls", help="list the recipes")
    runner = commands.add_parser("run", help="run a recipe; arguments after its name go to its LightningCLI")
    runner.add_argument("recipe")
    runner.add_argument("arguments", nargs=argparse.REMAINDER, help="for instance --trainer.max_epochs=3, or --help")
    auditor = commands.add_parser("audit", help="tell where EM lives in a model, layer by layer")
    auditor.add_argument("model", help="package.module:NAME or path/to/file.py:NAME, made without arguments")
    auditor.add_argument("--input", required=True, help="shape of a random input, for instance 32,784")
    auditor.add_argument("--ckpt_path", help="checkpoint for NAME, a LightningModule class, to load")
    parsed = parser.parse_args(argv)
    try:
        if parsed.command == "ls":
            _print_recipes()
        elif parsed.command == "audit":
            _audit(parsed.model, parsed.input, parsed.ckpt_path)
        else:
            run(parsed.recipe, parsed.arguments)
    except (UsageError, ValueError, TypeError, OSError) as error:
        told = own_error(error)
        if told is None:
            raise
        print(f"em-lightning: {told}", file=sys.stderr)
        return 2
    return 0


def _print_recipes() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "what it does", "variants", box=None, header_style="bold")
    for name, path in recipes().items():
        variants = sorted(variant.stem for variant in (folder_of("configs") / name).glob("*.yaml"))
        table.add_row(name, summary(path), ", ".join(variants))
    Console().print(table)


if __name__ == "__main__":
    # The recipes import this module by its name: its classes must be the same ones.
    from em_lightning.cli import main as named_main

    sys.exit(named_main())
