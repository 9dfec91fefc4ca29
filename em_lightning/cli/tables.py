"""What there is to choose from, as tables: recipes, and the parts of the registries."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

from em_lightning.cli.folders import docstring, recipes, variants_of

KINDS = ("kernels", "competitions", "statistics", "activations", "losses")


def parts_of(kind: str) -> list[tuple[str, type, str, str]]:
    """Return key, class, arguments and first sentence of every part of a registry.

    Args:
        kind: one of ``KINDS``.

    Example:
        >>> [key for key, *_ in parts_of("losses")][:2]
        ['free_energy', 'variance']
    """
    import em_lightning

    registry = getattr(em_lightning, kind.upper())
    return [(key, registry[key], _arguments(registry[key]), _first_sentence(registry[key])) for key in registry]


def _arguments(cls: type) -> str:
    parameters = inspect.signature(cls).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in named)


def _first_sentence(cls: type) -> str:
    line = (inspect.getdoc(cls) or "").partition("\n")[0]
    return re.sub(r":\w+:`(.+?)`", r"\1", line)


def _print(*columns: str, rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table: Any = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def print_recipes() -> None:
    """Print the recipes with their variants."""
    rows = [
        (name, docstring(path).partition("\n")[0], ", ".join(variants_of(path))) for name, path in recipes().items()
    ]
    _print("recipe", "what it does", "variants", rows=rows)


def print_parts(kind: str) -> None:
    """Print the parts of a registry, those of installed plug-ins among them."""
    rows = [(key, arguments, sentence) for key, _, arguments, sentence in parts_of(kind)]
    _print("key", "arguments", "what it is", rows=rows)
