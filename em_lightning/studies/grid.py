"""Runs of a recipe in parallel processes: one run per seed, or one per row and seed of a table.

The entry ``table`` of a config describes a table, which can be continued; other entries of the config are for all rows:

    table:
      title: Ablation
      seeds: [1, 2, 3]
      rows:
        lse:
          arguments: {model.variance: 0, model.decorrelation: 0}
          published: {dead_units: 64}
          checked: {dead_units: 64}

``checked`` values are those of an independent reproduction. A table without published values names its ``columns``,
such as ``[accuracy %, dead_units]``. A row with ``against: ROW`` is compared with ROW in the first column at each seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from em_lightning.studies.results import combine, compare, paired, spread, write_results

Results = Mapping[str, Sequence[Mapping[str, float]]]


@dataclasses.dataclass
class Table:
    """The entry ``table`` of a config; every key of a row is optional, and ``notes`` are sentences above the table."""

    title: str
    seeds: Sequence[int]
    rows: Mapping[str, Mapping[str, Any]]
    columns: Sequence[str] = ()
    notes: Sequence[str] = ()


class Cell(NamedTuple):
    """One row of a table with one seed: the arguments of the recipe, and the folder of the result."""

    row: str
    seed: int
    arguments: list[str]
    folder: Path

    @classmethod
    def seeded(cls, row: str, seed: int, arguments: Sequence[str], folder: Path, version: str) -> Cell:
        """Return a cell that trains with a seed and writes to a version of the logger's folder."""
        options = [f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.logger.version={version}"]
        return cls(row, seed, [*arguments, *options], folder / version)

    @property
    def result(self) -> Path:
        """The file that exists when the cell is finished."""
        return self.folder / "results.json"


def run_table(
    load: Callable[[], Any],
    entry: Mapping[str, Any],
    folder: Path,
    arguments: Sequence[str],
    *,
    configs: Sequence[Any] = (),
    command: str = "",
    jobs: int | None = None,
) -> None:
    """Run the unfinished cells of a table, and write ``results.md`` and ``results.json`` to ``folder``.

    The folder of a cell, ``cells/HASH-seedN`` beside ``folder``, is named by a hash of everything that the result
    depends on: the same command continues a table, other arguments start new cells, and tables share equal cells.

    Args:
        load: returns the :class:`~em_lightning.cli.Recipe`; must be picklable.
        entry: the entry ``table`` of the config.
        folder: folder of the results, inside the folder of the recipe's logger.
        arguments: arguments of the recipe, for all rows.
        configs: contents of the config files that ``arguments`` name, for the hash.
        command: the command that makes the table, for its first note.
        jobs: number of parallel processes. With ``None`` there is one per GPU if the recipe trains on GPUs, otherwise
            one per core.

    Raises:
        ValueError: an entry of the table is unknown, a cell failed, or the user interrupted the run.
    """
    try:
        table = Table(**entry)
    except TypeError as error:
        raise ValueError(f"table: {error}") from error
    # The configs enter the hash by their contents, not by their paths.
    options = [argument for argument in arguments if not argument.startswith("--config=")]
    cells = []
    for seed in table.seeds:  # the outer loop, so that all rows get their first results early
        for row, spec in table.rows.items():
            changes = [f"--{name}={value}" for name, value in spec.get("arguments", {}).items()]
            content = json.dumps([list(configs), options, changes], sort_keys=True, default=str)
            version = f"cells/{hashlib.sha256(content.encode()).hexdigest()[:12]}-seed{seed}"
            cells.append(Cell.seeded(row, seed, [*arguments, *changes], folder.parent, version))
    if any("fast_dev_run" in argument for argument in arguments):
        for cell in cells[: len(table.rows)]:  # of the first seed
            load().fit(cell.arguments)
        return
    run_cells(load, [cell for cell in cells if not cell.result.exists()], jobs)
    write_table(folder, table, cells, command)


def run_seeds(
    load: Callable[[], Any], folder: Path, arguments: Sequence[str], seeds: Sequence[int], jobs: int | None = None
) -> None:
    """Run a recipe once per seed, each in its own process, and combine their ``results.json``.

    Args are those of :func:`run_table`, except ``folder``, which is that of the recipe's logger.

    Raises:
        ValueError: the arguments select several devices, a run failed, or the runs have different tables.
    """
    for argument in arguments:
        if argument.startswith(("--trainer.strategy", "--trainer.devices")) and not argument.endswith(("=1", "=auto")):
            raise ValueError(f"{argument} must not be given with --seeds, which runs each seed in one process")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    cells = [Cell.seeded(folder.name, seed, arguments, folder, f"{stamp}-seed{seed}") for seed in seeds]
    run_cells(load, cells, jobs)
    title = f"{folder.name}, seeds {', '.join(map(str, seeds))}: mean ± standard deviation"
    write_results(folder / f"{stamp}-seeds", title, [], combine([cell.result for cell in cells]))
    print(f"Files in {folder / f'{stamp}-seeds'}: results.json, results.md")


def run_cells(load: Callable[[], Any], cells: Sequence[Cell], jobs: int | None = None) -> None:
    """Run cells in parallel processes."""
    from rich.progress import track

    if not cells:
        return
    cores, gpus = os.cpu_count() or 1, _gpus_of(load, cells[0])
    jobs = min(jobs or len(gpus) or cores, len(cells))
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()  # each process takes the name of its GPU, or an empty one
    for number in range(jobs):
        queue.put(gpus[number % len(gpus)] if gpus else "")
    with ProcessPoolExecutor(jobs, spawn, _start_worker, (max(cores // jobs, 1), queue)) as pool:
        runs = [pool.submit(run_cell, load, cell) for cell in cells]
        try:
            for future in track(runs, f"runs, {jobs} at a time"):
                future.result()
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.kill()  # otherwise they would start the next run; checkpoints are written atomically
            raise ValueError("interrupted; the same command continues a table") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _gpus_of(load: Callable[[], Any], cell: Cell) -> list[str]:
    """Return the names of the GPUs for ``CUDA_VISIBLE_DEVICES`` if the recipe trains on GPUs, else an empty list."""
    if not torch.cuda.is_available() or load().prepare(cell.arguments).trainer.strategy.root_device.type != "cuda":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def _start_worker(threads: int, queue: Any) -> None:
    """Set GPU and number of threads, and exit when the parent process has ended for any reason."""
    if gpu := queue.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_cell(load: Callable[[], Any], cell: Cell) -> None:
    """Train a row with one seed; resume from the checkpoint of an interrupted run if there is one.

    Raises:
        RuntimeError: the cell failed; the message names it and the file with its output.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    last = cell.folder / "checkpoints" / "last.ckpt"
    with (
        open(cell.folder / "output.txt", "a", encoding="utf-8") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            load().fit([*cell.arguments, *([f"--ckpt_path={last}"] if last.exists() else [])])
        except Exception as error:
            reason = " ".join(str(error).split())
            raise RuntimeError(f"{cell.row}, seed {cell.seed}: {reason} (see {output.name})") from error


def write_table(folder: Path, table: Table, cells: Sequence[Cell], command: str) -> None:
    """Write the table of finished cells."""
    seeds = sorted({cell.seed for cell in cells})
    values: dict[str, list[dict[str, float]]] = {row: [] for row in table.rows}
    for cell in cells:
        values[cell.row].append(json.loads(cell.result.read_text(encoding="utf-8"))["values"])
    rows, explained = _unpublished_rows(table, values) if table.columns else _published_rows(table, values)
    note = f"`{command}`, seeds {', '.join(map(str, seeds))}: mean ± standard deviation over the seeds."
    folders = {f"{cell.row}, seed {cell.seed}": str(cell.folder) for cell in cells}
    write_results(folder, table.title, [note, *table.notes, explained], rows, seeds=seeds, values=values, cells=folders)


def _published_rows(table: Table, results: Results) -> tuple[list[dict[str, Any]], str]:
    """Return one line per row and metric with a published or checked value, and what its columns mean."""
    rows = []
    for row, spec in table.rows.items():
        published, checked = spec.get("published", {}), spec.get("checked", {})
        for metric in {**published, **checked}:
            values = [float(result[metric]) for result in results[row]]
            rows.append({"row": row, "metric": metric, **compare(values, published.get(metric), checked.get(metric))})
    return rows, (
        "Difference: reproduced minus published, or minus checked if nothing is published; inside: the difference is "
        "at most the larger standard deviation of published and checked, plus half a unit of the last printed digit."
    )


def _unpublished_rows(table: Table, results: Results) -> tuple[list[dict[str, Any]], str]:
    """Return one line per row with a column per metric and the gain in the first one, and what the gain means."""
    first = table.columns[0]
    against = {row: spec["against"] for row, spec in table.rows.items() if "against" in spec}
    rows = []
    for row in table.rows:
        line = {"row": row}
        for metric in table.columns:
            values = [float(result[metric]) for result in results[row] if metric in result]
            line[metric] = spread(values) if values else ""
        if row in against:
            scores = [[float(result[first]) for result in results[name]] for name in (row, against[row])]
            line["gain"] = paired(*scores)
        elif against:
            line["gain"] = ""
        rows.append(line)
    if not against:
        return rows, "Nothing was published."
    pairs = "; ".join(f"{row} over {other}" for row, other in against.items())
    return rows, f"Gain: of {first}, mean ± standard error of the differences at the same seed: {pairs}."
