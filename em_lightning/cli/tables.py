"""Tables of what can be chosen: the recipes, and the classes in the registries."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from em_lightning.cli.recipes import docstring, recipes, variants_of

KINDS = ("kernels", "competitions", "statistics", "activations", "losses")


def parts_of(kind: str) -> list[tuple[str, type, str, str]]:
    """Return key, class, arguments and first sentence of each class in a registry, one of ``KINDS``.

    Example:
        >>> [key for key, *_ in parts_of("losses")][:2]
        ['free_energy', 'variance']
    """
    import em_lightning

    registry, parts = getattr(em_lightning, kind.upper()), []
    for key in registry:
        cls = registry[key]
        parameters = inspect.signature(cls).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        arguments = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in named)
        sentence = (inspect.getdoc(cls) or "").partition("\n")[0]
        parts.append((key, cls, arguments, re.sub(r"(?::\w+:)?`+(.+?)`+", r"\1", sentence)))
    return parts


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def print_recipes() -> None:
    """Print the recipes with their variants."""
    texts = ((name, docstring(path).partition("\n")[0], variants_of(path)) for name, path in recipes().items())
    print_table(["recipe", "what it does", "variants"], [(name, text, ", ".join(more)) for name, text, more in texts])


def print_parts(kind: str) -> None:
    """Print the classes in a registry, including those of installed plug-ins."""
    rows = [(key, arguments, sentence) for key, _, arguments, sentence in parts_of(kind)]
    print_table(["key", "arguments", "what it is"], rows)
