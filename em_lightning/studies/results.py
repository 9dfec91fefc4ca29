"""Tables of results: written as Markdown and JSON, combined over seeds, compared with published numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from em_lightning.files import write_whole

Row = Mapping[str, Any]


def markdown_table(rows: Sequence[Row]) -> str:
    """Return rows with the same keys as a Markdown table; floats have four significant digits.

    Example:
        >>> print(markdown_table([{"method": "EM", "log-likelihood": 1.23456}]))
        | method | log-likelihood |
        |---|---|
        | EM | 1.235 |
    """
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(row[key]) for key in header) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_results(folder: Path, title: str, notes: Sequence[str], rows: Sequence[Row], **facts: Any) -> str:
    """Write ``results.md`` and ``results.json``, with further entries ``facts``; print the Markdown and return it."""
    from rich.console import Console
    from rich.markdown import Markdown

    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([f"# {title}", *notes, markdown_table(rows)]) + "\n"
    write_whole(folder / "results.md", text)
    content = {"title": title, "notes": list(notes), "rows": [dict(row) for row in rows], **facts}
    write_whole(folder / "results.json", json.dumps(content, indent=2) + "\n")
    console = Console()
    if console.is_terminal:
        console.print(Markdown("\n\n".join([f"# {title}", *notes])))
        console.print(fitted_table(rows), crop=False)
    else:
        print(f"\n{text}")
    return text


def fitted_table(rows: Sequence[Row]) -> Any:
    """Return a table for a terminal that wraps headers and the first column, but no number."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(rows[0]):
        table.add_column(Text(name), min_width=max(len(_cell(row[name])) for row in rows) if i else None)
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    return table


def combine(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return one table from the ``results.json`` of several seeds, each float as mean ± standard deviation.

    Raises:
        ValueError: the tables have different rows.
    """
    tables = [json.loads(path.read_text(encoding="utf-8"))["rows"] for path in paths]
    labels = [[value for row in table for value in row.values() if isinstance(value, str)] for table in tables]
    if any(label != labels[0] for label in labels):
        raise ValueError(f"the tables {', '.join(map(str, paths))} have different rows; run the same config for each")
    combined = []
    for same_row in zip(*tables, strict=True):
        row = dict(same_row[0])
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = spread([of_seed[name] for of_seed in same_row])
        combined.append(row)
    return combined


def spread(values: Sequence[float]) -> str:
    """Return the mean ± standard deviation of values; the mean alone if there is one value.

    Example:
        >>> spread([93.0, 93.4])
        '93.2 ± 0.28'
    """
    return f"{statistics.fmean(values):.4g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def paired(values: Sequence[float], others: Sequence[float]) -> str:
    """Return the mean ± standard error of the differences between values at the same seeds.

    Example:
        >>> paired([93.0, 93.4, 93.2], [92.5, 92.7, 92.9])
        '+0.50 ± 0.12'
    """
    differences = [value - other for value, other in zip(values, others, strict=True)]
    mean = f"{statistics.fmean(differences):+.2f}"
    return f"{mean} ± {statistics.stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else mean


def compare(values: Sequence[float], published: Any, checked: Any) -> dict[str, Any]:
    """Return one line of a table: the published, checked and reproduced value and their difference.

    The difference is the mean of the reproduced values minus the published one, or minus the checked one if nothing is
    published. ``inside`` is "yes" if its absolute value is at most the larger of the standard deviations of published
    and checked, plus half a unit of the last digit of the value subtracted. Published and checked are numbers, texts
    (``"93.4 ± .3"``), or ``None``; the checked value is that of an independent reproduction.

    Example:
        >>> compare([93.0, 93.4], "93.4 ± .3", None)["difference"], compare([93.0, 93.4], 94.0, None)["inside"]
        ('-0.2', 'no')
    """
    parsed = [parse_number(value) for value in (published, checked) if value is not None]
    subtracted, _, half_digit = parsed[0]
    difference = statistics.fmean(values) - subtracted
    allowed = max(deviation for _, deviation, _ in parsed) + half_digit
    return {
        "published": "" if published is None else str(published),
        "checked": "" if checked is None else str(checked),
        "reproduced": spread(values),
        "difference": f"{difference:+.2g}",
        "inside": "yes" if abs(difference) <= allowed + 1e-12 else "no",  # 1e-12 for round-off
    }


def parse_number(value: float | str) -> tuple[float, float, float]:
    """Return a printed number, its standard deviation and half a unit of its last digit.

    Example:
        >>> parse_number("93.4 ± .3")
        (93.4, 0.3, 0.05)
    """
    mean, _, deviation = str(value).partition("±")
    return float(mean), float(deviation or 0.0), 0.5 * 10.0 ** -len(mean.strip().partition(".")[2])
