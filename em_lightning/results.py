"""Tables of results: written as Markdown for people and JSON for programs, and combined over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from em_lightning.files import write_whole

Row = Mapping[str, Any]


def markdown_table(rows: Sequence[Row]) -> str:
    """Return rows of the same keys as a Markdown table; numbers have four significant digits.

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
    """Write ``results.md`` and ``results.json`` into a folder and return the Markdown.

    Args:
        folder: made if it is not there.
        title: the heading.
        notes: sentences above the table: which data, how measured.
        rows: the table.
        **facts: further entries of the JSON, such as the seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([f"# {title}", *notes, markdown_table(rows)]) + "\n"
    write_whole(folder / "results.md", text)
    content = {"title": title, "notes": list(notes), "rows": [dict(row) for row in rows], **facts}
    write_whole(folder / "results.json", json.dumps(content, indent=2) + "\n")
    return text


def combine(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return one table from the ``results.json`` of several seeds: every number as mean ± standard deviation.

    Raises:
        ValueError: the tables have different rows.
    """
    tables = [json.loads(path.read_text(encoding="utf-8"))["rows"] for path in paths]
    labels = [[_label(row) for row in table] for table in tables]
    if any(label != labels[0] for label in labels):
        raise ValueError(
            f"the tables of {', '.join(map(str, paths))} have different rows; run the same config for each"
        )
    combined = []
    for rows in zip(*tables, strict=True):
        combined.append({key: _spread([row[key] for row in rows]) for key in rows[0]})
    return combined


def _label(row: Row) -> list[str]:
    return [value for value in row.values() if isinstance(value, str)]


def _spread(values: Sequence[Any]) -> Any:
    if not isinstance(values[0], float) or len(values) < 2:
        return values[0]
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return f"{mean:.4g} ± {deviation:.2g}"
