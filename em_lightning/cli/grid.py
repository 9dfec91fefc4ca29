"""Published tables: rows times seeds of a recipe, in processes side by side, continued where they stopped.

A variant config with the entry ``table`` is such a table; the rest of it is an ordinary config, shared by all rows:

    table:
      title: Ablation
      seeds: [1, 2, 3]
      rows:
        lse:
          arguments: {model.variance: 0, model.decorrelation: 0}
          published: {dead_units: 64}
          checked: {dead_units: 64}

A table of one's own, where nothing was published, names its ``columns``, and a row may name another that it is read
``against``:

    table:
      title: Widths
      seeds: [1, 2, 3]
      columns: [accuracy %, dead_units]
      rows:
        baseline:
          arguments: {model.weight: 0}
        with volume control:
          against: baseline
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shlex
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from em_lightning.cli.configs import read_config
from em_lightning.cli.folders import UsageError, config_of, load_recipe, own_error, variants_of
from em_lightning.results import write_results


class Cell(NamedTuple):
    """One row of a table under one seed: the recipe's arguments, and the folder that its result goes to."""

    row: str
    seed: int
    arguments: list[str]
    folder: Path

    @property
    def result(self) -> Path:
        """The file that says that the cell is finished."""
        return self.folder / "results.json"


def table_of(args: Sequence[str]) -> dict[str, Any] | None:
    """Return the table of the one config that has it among ``--config`` arguments."""
    for before, arg in zip(["", *args], args, strict=False):
        path = arg if before in ("--config", "-c") else arg.partition("=")[2] if arg.startswith("--config=") else ""
        if path:
            content = read_config(path)
            if isinstance(content, dict) and "table" in content:
                return {"path": path, **content}
    return None


def run_table(script: Path, args: Sequence[str], table: dict[str, Any], seeds: Sequence[int], jobs: int | None) -> None:
    """Run what is not finished of a table, and write it.

    A cell's folder, in ``lightning_logs/NAME/cells``, is named by a hash of all that it depends on: the same command
    again continues, other arguments start anew, and tables share the cells that they have in common.

    Args:
        script: of the recipe.
        args: of its command line, with the config of the table.
        table: as :func:`table_of` gives it.
        seeds: those to run in place of the table's own, if any.
        jobs: processes side by side, one thread each; ``None`` takes as many as there are cores.

    Raises:
        UsageError: a cell failed, or the user interrupted it.
    """
    path = table.pop("path")
    content = table.pop("table")
    name = script.stem
    logs = Path("lightning_logs") / name
    text = yaml.safe_dump(table)
    defaults = yaml.safe_load(config_of(script).read_text(encoding="utf-8"))
    config = logs / "cells" / f"{_digest(text)}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(text, encoding="utf-8")
    variant = Path(path).stem if path == str(variants_of(script).get(Path(path).stem)) else path
    command = shlex.join(["em-lightning", "run", name, *(arg.replace(path, variant) for arg in args)])
    args = [arg.replace(path, str(config)) for arg in args]
    cells = []
    for seed in seeds or content["seeds"]:  # outside, so that all rows are seen early
        for row, spec in content["rows"].items():
            given = [f"--{key}={value}" for key, value in spec.get("arguments", {}).items()]
            own = [*args, *given, f"--seed_everything={seed}", f"--data.seed={seed}"]
            version = f"cells/{_digest(json.dumps([defaults, own]))}-seed{seed}"
            cells.append(Cell(row, seed, [*own, f"--trainer.logger.version={version}"], logs / version))
    if any("fast_dev_run" in arg for arg in args):
        for cell in cells:
            if cell.seed == cells[0].seed:
                load_recipe(script).main(cell.arguments)
        return
    _run_cells(script, [cell for cell in cells if not cell.result.exists()], jobs)
    _write(logs / Path(path).stem, content, cells, command)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _run_cells(script: Path, cells: list[Cell], jobs: int | None) -> None:
    from rich.progress import track

    if not cells:
        return
    groups = [[cell for cell in cells if cell.row == row] for row in dict.fromkeys(cell.row for cell in cells)]
    jobs = min(jobs or os.cpu_count() or 1, len(groups))
    # Read by the processes' libraries as they start.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        done = [pool.submit(_run_row, script, group) for group in groups]
        try:
            for future in track(done, f"rows, {jobs} at a time"):
                future.result()
        except RuntimeError as error:
            raise UsageError(str(error)) from error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.kill()  # they would take up the next row; a checkpoint is there whole or not at all
            raise UsageError("interrupted; the same command goes on with what has been trained") from None
        finally:
            pool.shutdown(cancel_futures=True)
            os.environ.pop("OMP_NUM_THREADS")
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before


def _run_row(script: Path, cells: list[Cell]) -> None:
    """Train the seeds of a row, together where the recipe can prepare them so."""
    recipe = load_recipe(script)
    together = len(cells) > 1 and hasattr(recipe, "prepare") and _trains_together(recipe, cells[0])
    for group in [cells] if together else [[cell] for cell in cells]:
        folder = group[0].folder
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "a", encoding="utf-8") as output:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                try:
                    if together:
                        _train_together(recipe, group)
                    else:
                        recipe.main([*group[0].arguments, *_resumed(folder)])
                except Exception as error:
                    told = own_error(error) or error
                    raise RuntimeError(f"{group[0].row}, seed {group[0].seed}: {told} (see {output.name})") from error


def _trains_together(recipe: Any, cell: Cell) -> bool:
    try:
        return recipe.prepare(cell.arguments).model.automatic_optimization  # others train in ways of their own
    except Exception:  # told as that of the cell, when it runs
        return False


def _resumed(folder: Path) -> list[str]:
    last = folder / "checkpoints" / "last.ckpt"
    return [f"--ckpt_path={last}"] if last.exists() else []


def _train_together(recipe: Any, cells: list[Cell]) -> None:
    """Train the networks of several seeds at once, with the trainer of the first and a report for each."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from em_lightning.callbacks import LayerReport
    from em_lightning.modules import ReplicaData, Replicas

    made = [recipe.prepare(cell.arguments) for cell in cells]
    folder = cells[0].folder.parent / f"together-{_digest(json.dumps([cell.arguments for cell in cells]))}"
    trainer = made[0].trainer
    callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, LayerReport)]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.dirpath = str(folder / "checkpoints")
    for r, cli in enumerate(made):
        for report in [callback for callback in cli.trainer.callbacks if isinstance(callback, LayerReport)]:
            report.follow(r, cells[r].folder, cli.model, cli.datamodule)
            callbacks.insert(0, report)
    trainer.callbacks = callbacks
    last = folder / "checkpoints" / "last.ckpt"
    model, data = Replicas([cli.model for cli in made]), ReplicaData([cli.datamodule for cli in made])
    trainer.fit(model, data, ckpt_path=str(last) if last.exists() else None, weights_only=True)


def _write(folder: Path, content: dict[str, Any], cells: list[Cell], command: str) -> None:
    seeds = sorted({cell.seed for cell in cells})
    values = {
        row: [json.loads(cell.result.read_text(encoding="utf-8"))["values"] for cell in cells if cell.row == row]
        for row in content["rows"]
    }
    rows, explained = _own_table(content, values) if "columns" in content else _published_table(content, values)
    notes = [
        f"`{command}`, seeds {', '.join(map(str, seeds))}: mean ± standard deviation over the seeds.",
        *content.get("notes", []),
        explained,
    ]
    folders = {f"{cell.row}, seed {cell.seed}": str(cell.folder) for cell in cells}
    text = write_results(folder, content["title"], notes, rows, seeds=seeds, values=values, cells=folders)
    print(f"\n{text}\nWritten to {folder}")


Results = dict[str, list[dict[str, float]]]


def _published_table(content: dict[str, Any], results: Results) -> tuple[list[dict[str, Any]], str]:
    rows = []
    for row, spec in content["rows"].items():
        published, checked = spec.get("published", {}), spec.get("checked", {})
        for metric in [*published, *(key for key in checked if key not in published)]:
            values = [float(result[metric]) for result in results[row]]
            rows.append({"row": row, "metric": metric, **compare(values, published.get(metric), checked.get(metric))})
    return rows, (
        "Difference: reproduced less published, or less checked where nothing is published; inside: it is at most the "
        "larger standard deviation of these two, and half a unit of the last digit that was printed."
    )


def _own_table(content: dict[str, Any], results: Results) -> tuple[list[dict[str, Any]], str]:
    first = content["columns"][0]
    rows = []
    for row, spec in content["rows"].items():
        line = {"row": row}
        for metric in content["columns"]:
            values = [float(result[metric]) for result in results[row] if metric in result]
            line[metric] = spread(values) if values else ""
        if any("against" in each for each in content["rows"].values()):
            line["gain"] = ""
            if "against" in spec:
                line["gain"] = paired(*([float(r[first]) for r in results[name]] for name in (row, spec["against"])))
        rows.append(line)
    against = {row: spec["against"] for row, spec in content["rows"].items() if "against" in spec}
    if not against:
        return rows, "Nothing was published."
    pairs = {other: [row for row, of in against.items() if of == other] for other in dict.fromkeys(against.values())}
    named = "; ".join(f"{', '.join(names)} over {other}" for other, names in pairs.items())
    return rows, f"Gain: of {first}, mean ± standard error of the differences at the same seed: {named}."


def spread(values: Sequence[float]) -> str:
    """Return the mean ± standard deviation of values, or their one value.

    Example:
        >>> spread([93.0, 93.4])
        '93.2 ± 0.28'
    """
    return f"{statistics.fmean(values):.4g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def paired(values: Sequence[float], others: Sequence[float]) -> str:
    """Return the mean ± standard error of the differences of values at the same seeds.

    Example:
        >>> paired([93.0, 93.4, 93.2], [92.5, 92.7, 92.9])
        '+0.50 ± 0.12'
    """
    differences = [value - other for value, other in zip(values, others, strict=True)]
    mean = f"{statistics.fmean(differences):+.2f}"
    return f"{mean} ± {statistics.stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else mean


def compare(values: Sequence[float], published: Any, checked: Any) -> dict[str, Any]:
    """Return a line of the table: what was published, checked and reproduced, and how far apart they are.

    Args:
        values: reproduced, one for each seed.
        published: a number, or a text such as ``"93.4 ± .3"``; ``None`` where there is none.
        checked: the same.

    Example:
        >>> compare([93.0, 93.4], "93.4 ± .3", None)["difference"], compare([93.0, 93.4], 94.0, None)["inside"]
        ('-0.2', 'no')
    """
    mean = statistics.fmean(values)
    parsed = [_number(value) for value in (published, checked) if value is not None]
    difference = mean - parsed[0][0]
    allowed = max(deviation for _, deviation, _ in parsed) + parsed[0][2]
    return {
        "published": "" if published is None else str(published),
        "checked": "" if checked is None else str(checked),
        "reproduced": spread(values),
        "difference": f"{difference:+.2g}",
        "inside": "yes" if abs(difference) <= allowed + 1e-12 else "no",
    }


def _number(value: Any) -> tuple[float, float, float]:
    """Return a number, its standard deviation and half a unit of its last digit."""
    mean, _, deviation = str(value).partition("±")
    digits = mean.strip().partition(".")[2]
    return float(mean), float(deviation or 0.0), 0.5 * 10.0 ** -len(digits)
