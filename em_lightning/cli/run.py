"""``em-lightning run``: a recipe by its LightningCLI, once or for several seeds."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from em_lightning.cli.configs import check_configs
from em_lightning.cli.folders import (
    UsageError,
    config_of,
    docstring,
    find_recipe,
    load_recipe,
    nearest,
    variants_of,
)
from em_lightning.cli.grid import run_table, table_of
from em_lightning.files import write_whole

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


def run(name: str, args: Sequence[str]) -> None:
    """Run a recipe with the arguments of its LightningCLI.

    ``--config NAME`` also takes the name of one of the recipe's variants; ``--seeds 0,1,2`` runs it once a seed, in
    processes side by side where cores allow (``--jobs`` of them), and combines their tables. A variant that is a
    published table runs all of its rows and seeds so, and continues where it stopped.

    Args:
        name: of the recipe, or the path of a copy of its script.
        args: for its LightningCLI.

    Raises:
        UsageError: there is no such recipe, or an argument is wrong.
    """
    script = find_recipe(name)
    args = _with_variant(script, list(args))
    seeds, args = _take_numbers("seeds", args)
    jobs, args = _take_numbers("jobs", args)
    if jobs and (len(jobs) > 1 or jobs[0] < 1):
        raise UsageError(f"--jobs={','.join(map(str, jobs))} must be one number, at least 1")
    at_once = jobs[0] if jobs else None
    table = table_of(args)
    if table is not None:
        return run_table(script, args, table, seeds, at_once)
    if seeds:
        return _run_seeds(name, args, seeds, at_once)
    if at_once:
        raise UsageError(f"--jobs={at_once} is for several runs, and this is one; give --seeds too, or leave it out")
    load_recipe(script).main(args)


def _with_variant(script: Path, args: list[str]) -> list[str]:
    """Replace the name of a variant behind ``--config`` by its path."""
    variants = variants_of(script)
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
                    f"--config={value!r} is neither a file nor a variant of {script.stem}"
                    f"{nearest(value, list(variants))} Variants: {', '.join(variants) or 'none'}"
                )
            value = str(variants[value])
        resolved.append(f"{flag}{equals}{value}")
    check_configs(resolved)
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
    folder = Path("lightning_logs") / Path(name).stem
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
    write_whole(target / "results.md", text)
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
        name: of the recipe: its default config is ``<name>.yaml`` beside the script that calls this, or else in the
            folder of configs.
        args: of the command line; ``--help`` prints what fits a screen and ends, ``--help=all`` everything.
        subclass_data: whether ``--data`` names a subclass.
        subclass_model: whether ``--model`` names a subclass.
        links: arguments of the model that are attributes of the data, such as ``"num_features"``.

    Raises:
        UsageError: an argument is unknown or has a wrong value.
    """
    from jsonargparse import ArgumentError
    from lightning.fabric.plugins.io import TorchCheckpointIO
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from em_lightning.checkpoints import AtomicCheckpointIO

    script = Path(sys._getframe(1).f_globals.get("__file__", name)).with_name(f"{name}.py")
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

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            if {"-h", "--help"} & set(args):
                print(_short_help(script, parser))
                raise SystemExit(0)
            for link in links:
                for flag in (f"--model.{link}", f"--model.init_args.{link}"):
                    if flag in (arg.partition("=")[0] for arg in args):
                        raise UsageError(f"{flag} follows from the data and cannot be given; leave it out")
            super().parse_arguments(parser, ["--help" if arg == "--help=all" else arg for arg in args])
            checkpoint = self.config.ckpt_path
            # Lightning knows some words and addresses too: "last", "s3://...".
            if (
                checkpoint
                and checkpoint.endswith(".ckpt")
                and "://" not in checkpoint
                and not Path(checkpoint).is_file()
            ):
                raise UsageError(f"--ckpt_path={checkpoint!r} is no file; give the path of a checkpoint")
            if checkpoint and Path(checkpoint).is_file():
                from em_lightning.checkpoints import read_checkpoint

                read_checkpoint(checkpoint)  # before the data are made, and with its sums

        def instantiate_trainer(self, **options: Any) -> Any:
            try:
                trainer = super().instantiate_trainer(**options)
            except (ValueError, MisconfigurationException) as error:
                raise UsageError(f"the trainer cannot be built: {error}") from error
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                trainer.strategy.checkpoint_io = AtomicCheckpointIO()
            return trainer

    for words in _NOISE:
        warnings.filterwarnings("ignore", words)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
    options = {
        "allow_abbrev": False,
        "exit_on_error": False,
        "default_config_files": [str(config_of(script))],
        "prog": f"em-lightning run {name}",
    }
    try:
        return RecipeCLI(
            model,
            data,
            subclass_mode_model=subclass_model,
            subclass_mode_data=subclass_data,
            run=False,
            args=_with_variant(script, list(args)),
            parser_kwargs=options,
            save_config_kwargs={"overwrite": True},
        )
    except ArgumentError as error:
        import em_lightning.callbacks

        subclasses: list[type] = data.__subclasses__()
        classes = [cls.__name__ for cls in subclasses] + em_lightning.callbacks.__all__
        raise UsageError(_shorten(str(error), keys, classes)) from error


def _short_help(script: Path, parser: Any) -> str:
    """Return what a recipe says about itself, and its own arguments with their defaults, wrapped to a screen."""
    defaults = parser.get_defaults()

    def flat(prefix: str, values: Any) -> list[str]:
        return [f"--{prefix}.{key}={value}" for key, value in sorted(vars(values).items()) if value is not None]

    def of_group(group: str, values: Any) -> list[str]:
        if "class_path" not in values:
            return flat(group, values)
        return [f"--{group}={values.class_path.rpartition('.')[2]}", *flat(group, values.init_args)]

    sections = {
        "Model": of_group("model", defaults.model),
        "Data": of_group("data", defaults.data),
        "Training": [
            f"--{key}={defaults[key]}" for key in ("seed_everything", "trainer.max_epochs", "trainer.accelerator")
        ],
    }
    lines = [docstring(script)]
    for title, options in sections.items():
        text = textwrap.fill(
            " ".join(options), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        )
        lines.append(f"{title}, with defaults:\n{text}")
    variants = ", ".join(variants_of(script)) or "none"
    lines.append(
        textwrap.fill(
            f"--config NAME or FILE: variants: {variants}. --seeds 0,1,2: once a seed, and one table of all; "
            "--jobs N: so many runs of a table or of seeds at a time, in place of one a core.",
            100,
        )
    )
    lines.append("--help=all: every argument of Lightning's Trainer too. --print_config: the whole config.")
    return "\n\n".join(lines)


def parameters_of(cls: type) -> list[str]:
    """Return the names of the constructor's arguments of a class and those before it."""
    names = {name for base in cls.__mro__ if "__init__" in vars(base) for name in inspect.signature(base).parameters}
    return sorted(names)


def _shorten(message: str, keys: Sequence[str], classes: Sequence[str]) -> str:
    """Return a parser's complaint on one line, with the valid key or class that is nearest to an unknown one."""
    line = re.sub(r"\s+", " ", message).strip()
    for pattern in _UNKNOWN_KEY:
        found = re.search(pattern, line)
        if found:
            key = ".".join(found.groups())
            if key in keys:  # of other classes than the one that was chosen
                return f"{key!r} is no key of the {key.partition('.')[0]} class chosen here; choose one that has it"
            return f"unknown key {key!r}{nearest(key, keys)}"
    line = re.sub(r'Parser key "([\w.]+)":', r"\1:", line)
    line = re.sub(r"- Expected a path but .*? either not accessible or invalid - ", "", line)
    unknown = re.search(r"([\w.]+): .*Expected a dot import path string: (\w+)", line)
    if unknown:
        return f"{unknown[1]}: there is no class {unknown[2]!r} here{nearest(unknown[2], classes)}"
    # Of the complaints of a union the first is about what was given, the others about what was not meant.
    line = re.sub(r"Does not validate against any of the Union subtypes.*?Errors: - (.*?) - Expected.*", r"\1", line)
    line = re.sub(r"Expected a <class '([\w.]+)'>\. Got value: (.*)", r"\2 is no \1", line)
    line = re.sub(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)", r"\2 is none of \1", line)
    return re.sub(r"Expected a (?:<class '([\w.]+)'>|typing\.Literal\[(.*?)\])", r"give \1\2", line)
