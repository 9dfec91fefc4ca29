"""Tables of what can be chosen: the recipes, and the classes in the registries."""

from __future__ import annotations

import inspect
import re

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


def print_recipes() -> None:
    """Print the recipes with their variants."""
    for name, path in recipes().items():
        variants = f" Variants: {', '.join(variants_of(path))}." if variants_of(path) else ""
        print(f"{name}: {docstring(path).splitlines()[0]}{variants}")


def print_parts(kind: str) -> None:
    """Print the classes in a registry, including those of installed plug-ins."""
    for key, _, arguments, sentence in parts_of(kind):
        print(f"{key}({arguments}): {sentence}")
