"""Recipe, and the scripts and configs of the recipes: find, copy and load them, in a checkout or a wheel."""

from __future__ import annotations

import ast
import dataclasses
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A LightningModule and a LightningDataModule, and what all recipes share: command line, logger, checkpoints.

    ``em-lightning run SCRIPT`` runs the variable ``recipe`` of a script.

    Args:
        script: ``__file__`` of the script. Its default config has the same name with the suffix ``.yaml`` and lies
            beside the script or else in the folder of configs.
        model, data: the classes, or base classes, of the LightningModule and of the LightningDataModule.
        report: class of the callback that measures at the end of the fit, configured under the key ``report``.
        data_to_model: attributes of the data that are passed to the model, such as ``"num_features"``.
        model_subclasses, data_subclasses: whether ``--model`` and ``--data`` name subclasses of ``model`` and ``data``.
        threads: number of threads of PyTorch; ``None`` keeps PyTorch's default.
    """

    script: str
    model: type
    data: type
    report: type
    data_to_model: Sequence[str] = ()
    model_subclasses: bool = False
    data_subclasses: bool = True
    threads: int | None = None

    def main(self) -> None:
        """Run the recipe with the arguments of the process, as ``em-lightning run SCRIPT`` does, and exit."""
        from em_lightning.cli import main

        sys.exit(main(["run", self.script, *sys.argv[1:]]))

    def fit(self, args: Sequence[str]) -> None:
        """Print a line on the data and one on the model, then train; ``args`` are those of a LightningCLI."""
        self.prepare(args).fit()

    def prepare(self, args: Sequence[str]) -> Any:
        """Return a LightningCLI that has built model, data and trainer from the arguments."""
        from em_lightning.cli.recipe import RecipeCLI  # loads Lightning, which `ls` and `cp` do not need

        return RecipeCLI(self, args)


def folder_of(name: str) -> Path:
    """Return the folder ``recipes`` or ``configs``: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / name if (package / name).is_dir() else package.parent / name


def recipes() -> dict[str, Path]:
    """Return the scripts of all recipes by name."""
    return {path.stem: path for path in sorted(folder_of("recipes").glob("*.py"))}


def print_recipes() -> None:
    """Print the recipes with their variants."""
    for name, path in recipes().items():
        variants = f" Variants: {', '.join(variants_of(path))}." if variants_of(path) else ""
        print(f"{name}: {docstring(path).splitlines()[0]}{variants}")


def find_recipe(name: str) -> Path:
    """Return the script of a recipe, given by its name or by the path of a copy; ValueError if there is none."""
    known = recipes()
    if name in known:
        return known[name]
    if name.endswith(".py") and Path(name).is_file():
        return Path(name)
    raise ValueError(f"recipe={name!r} must be one of {', '.join(known)}, or the path of a script")


def config_of(script: Path) -> Path:
    """Return the default config of a script: beside it if there is one, else in the folder of configs."""
    beside = script.with_suffix(".yaml")
    return beside if beside.is_file() else folder_of("configs") / beside.name


def variants_of(script: Path) -> dict[str, Path]:
    """Return the configs of a recipe's variants by name."""
    return {path.stem: path for path in sorted(config_of(script).with_suffix("").glob("*.yaml"))}


def find_config(script: Path, config: str) -> Path:
    """Return a config, given by its path or by the name of a variant; ValueError if there is none."""
    variants = variants_of(script)
    if Path(config).is_file():
        return Path(config)
    if config not in variants:
        known = ", ".join(variants) or "none"
        raise ValueError(f"--config={config!r} must be a file or a variant of {script.stem} (variants: {known})")
    return variants[config]


def read_config(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; ValueError if it is not a mapping of plain values."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a YAML file with plain values: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping, got {type(content).__name__}")
    return content


def docstring(script: Path) -> str:
    """Return the docstring of a recipe; its first line says what the recipe does."""
    return ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""


def copy(name: str, folder: Path) -> list[Path]:
    """Copy a recipe's script and configs to a folder, and return the new files; ValueError if a file exists."""
    script = find_recipe(name)
    targets = {path: folder / path.name for path in (script, config_of(script))}
    targets |= {path: folder / script.stem / path.name for path in variants_of(script).values()}
    if taken := [str(target) for target in targets.values() if target.exists()]:
        raise ValueError(f"these files exist: {', '.join(taken)}; give another folder: em-lightning cp {name} FOLDER")
    for source, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Change the commands in the comments, so that they run the copy.
        text = source.read_text(encoding="utf-8").replace(f"run {script.stem}", f"run {script.name}")
        target.write_text(text, encoding="utf-8")
    return list(targets.values())


def load_recipe(script: Path) -> Recipe:
    """Run the script of a recipe and return its variable ``recipe``; ValueError if it defines none."""
    from rich.console import Console

    with Console(stderr=True).status("Loading PyTorch, Lightning and PyG"):
        names = runpy.run_path(str(script))
    if "recipe" not in names:
        raise ValueError(f"{script} must define recipe = em_lightning.cli.Recipe(...)")
    return names["recipe"]
