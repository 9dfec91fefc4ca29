"""Write the table of the README that lists the library's parts: python docs/make_tables.py."""

import inspect
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
MARKED = re.compile(r"(<!-- inside: made by docs/make_tables.py -->\n).*?(<!-- end -->)", re.DOTALL)


def inside() -> str:
    """Return a table of the registries, callbacks, reports and recipes."""
    import lightning

    import em_lightning
    from em_lightning import callbacks, studies
    from em_lightning.cli.recipes import recipes

    kinds = ("KERNELS", "COMPETITIONS", "STATISTICS", "ACTIVATIONS", "LOSSES")
    names = {f"`{kind}`": list(getattr(em_lightning, kind)) for kind in kinds}
    for title, room in {"callbacks": callbacks, "reports": studies}.items():
        classes = {name: getattr(room, name) for name in room.__all__}
        names[title] = [
            name for name, cls in classes.items() if inspect.isclass(cls) and issubclass(cls, lightning.Callback)
        ]
    names["recipes"] = list(recipes())
    rows = [f"| {title} | {', '.join(parts)} |" for title, parts in names.items()]
    return "\n".join(["| | |", "|---|---|", *rows, ""])


def updated(readme: str) -> str:
    """Return the README with the new table."""
    return MARKED.sub(lambda found: found[1] + inside() + found[2], readme)


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
