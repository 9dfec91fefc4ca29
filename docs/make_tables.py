"""Update the generated table of the README: python docs/make_tables.py."""

import inspect
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
MARKED = re.compile(r"(<!-- inside: made by docs/make_tables.py -->\n).*?(<!-- end -->)", re.DOTALL)


def inside() -> str:
    """Return a table of all registered components, callbacks and recipes."""
    import lightning

    from em_lightning import callbacks
    from em_lightning.cli import KINDS, parts_of, recipes

    names = {f"`{kind.upper()}`": [key for key, *_ in parts_of(kind)] for kind in KINDS}
    classes = {name: getattr(callbacks, name) for name in callbacks.__all__}
    names["callbacks"] = [
        name for name, cls in classes.items() if inspect.isclass(cls) and issubclass(cls, lightning.Callback)
    ]
    names["recipes"] = list(recipes())
    rows = [f"| {kind} | {', '.join(each)} |" for kind, each in names.items()]
    return "\n".join(["| | |", "|---|---|", *rows, ""])


def updated(readme: str) -> str:
    """Return the README with its table updated."""
    return MARKED.sub(lambda found: found[1] + inside() + found[2], readme)


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
