"""Where recipes and their configs are (inside the package of a wheel, or beside it), and what users are told."""

from __future__ import annotations

import importlib.util
import linecache
from pathlib import Path
from typing import Any


def folder_of(name: str) -> Path:
    """Return the folder ``recipes`` or ``configs``: inside the package of a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def recipes() -> dict[str, Path]:
    """Return the scripts of all recipes by name."""
    return {path.stem: path for path in sorted(folder_of("recipes").glob("*.py")) if not path.stem.startswith("_")}


def load_recipe(name: str) -> Any:
    """Return the script of a recipe as a module."""
    spec = importlib.util.spec_from_file_location(f"em_lightning_recipe_{name}", recipes()[name])
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


class UsageError(Exception):
    """A mistake of the user: its message is all that is printed."""


def own_error(error: BaseException | None) -> BaseException | None:
    """Return what the library itself raised, be it wrapped by others: that message needs no traceback."""
    while error is not None:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        if frame is not None:
            file = frame.tb_frame.f_code.co_filename
            raised = linecache.getline(file, frame.tb_lineno).lstrip().startswith("raise ")
            if raised and Path(file).is_relative_to(Path(__file__).parent):
                return error
        error = error.__cause__ or error.__context__
    return None
