"""Runs of one recipe with several seeds in parallel, and their table of means and standard deviations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from em_lightning.studies.grid import Cell, run_cells
from em_lightning.studies.results import combine, write_results


def run_seeds(
    load: Callable[[], Any], folder: Path, arguments: Sequence[str], seeds: Sequence[int], jobs: int | None = None
) -> None:
    """Run a recipe once per seed, each in its own process, and combine their ``results.json``.

    Args:
        load: returns the :class:`~em_lightning.cli.Recipe`; must be picklable.
        folder: folder of the recipe's logger.
        arguments: arguments of the recipe.
        seeds: the seed of each run.
        jobs: number of parallel processes; ``None`` takes the number of cores.

    Raises:
        ValueError: the arguments select several devices, a run failed, or the runs have different tables.
    """
    for argument in arguments:
        if argument.startswith(("--trainer.strategy", "--trainer.devices")) and not argument.endswith(("=1", "=auto")):
            raise ValueError(f"{argument} must not be given with --seeds, which runs each seed in one process")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    cells = []
    for seed in seeds:
        version = f"{stamp}-seed{seed}"
        own = [f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.logger.version={version}"]
        cells.append(Cell(folder.name, seed, [*arguments, *own], folder / version))
    run_cells(load, cells, jobs)
    rows = combine([cell.result for cell in cells])
    title = f"{folder.name}, seeds {', '.join(map(str, seeds))}: mean ± standard deviation"
    target = folder / f"{stamp}-seeds"
    write_results(target, title, [], rows)
    print(f"Files in {target}: results.json, results.md")
