"""Recipes and their configs: found in a checkout, in an installed wheel or in a user's copy, and copied."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import linecache
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """A mistake of the user: its message is all that is printed."""


def nearest(word: str, known: Sequence[str]) -> str:
    """Return the end of a sentence about an unknown word: a full stop, or the known word that it resembles."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def folder_of(name: str) -> Path:
    """Return the folder ``recipes`` or ``configs``: inside the package of a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / name if (package / name).is_dir() else package.parent / name


def recipes() -> dict[str, Path]:
    """Return the scripts of all recipes by name."""
    return {path.stem: path for path in sorted(folder_of("recipes").glob("*.py")) if not path.stem.startswith("_")}


def find_recipe(name: str) -> Path:
    """Return the script of a recipe that is given by its name, or as the path of a copy of it.

    Raises:
        UsageError: there is no such recipe or file.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UsageError(f"there is no file {name!r}; give a recipe's name, or the path of a copy of its script")
        return Path(name)
    known = recipes()
    if name not in known:
        raise UsageError(f"unknown recipe {name!r}{nearest(name, list(known))} Known: {', '.join(known)}")
    return known[name]


def config_of(script: Path) -> Path:
    """Return the default config of a recipe's script: beside it in a user's copy, else in the folder of configs."""
    beside = script.with_suffix(".yaml")
    return beside if beside.is_file() else folder_of("configs") / beside.name


def variants_of(script: Path) -> dict[str, Path]:
    """Return the configs of a recipe's variants by name."""
    return {path.stem: path for path in sorted(config_of(script).with_suffix("").glob("*.yaml"))}


def docstring(script: Path) -> str:
    """Return what a recipe says about itself; its first line is what it does."""
    return ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""


def copy(name: str, folder: Path) -> list[Path]:
    """Copy a recipe's script and configs into a folder, to be edited and run there, and return the new files.

    Raises:
        UsageError: there is no such recipe, or a file of that name is there already.
    """
    script = find_recipe(name)
    config = config_of(script)
    targets = {script: folder / script.name, config: folder / config.name}
    targets |= {path: folder / script.stem / path.name for path in variants_of(script).values()}
    for target in targets.values():
        if target.exists():
            raise UsageError(f"{target} is there already; name another folder: em-lightning cp {name} FOLDER")
    for source, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text(encoding="utf-8")
        # The copy's own comments should start the copy.
        text = text.replace(f"em-lightning run {script.stem}", f"em-lightning run {script.name}")
        target.write_text(text, encoding="utf-8")
    return list(targets.values())


def load_recipe(script: Path) -> Any:
    """Return the script of a recipe as a module."""
    from rich.console import Console

    spec = importlib.util.spec_from_file_location(f"em_lightning_recipe_{script.stem}", script)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    with Console(stderr=True).status("Loading PyTorch, Lightning and PyG"):
        spec.loader.exec_module(recipe)
    return recipe


def own_error(error: BaseException | None) -> BaseException | None:
    """Return what the library itself raised, be it wrapped by others: that message needs no traceback."""
    while error is not None:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        if frame is not None:
            file = frame.tb_frame.f_code.co_filename
            raised = linecache.getline(file, frame.tb_lineno).lstrip().startswith("raise ")
            if raised and Path(file).is_relative_to(Path(__file__).parents[1]):
                return error
        error = error.__cause__ or error.__context__
    return None
