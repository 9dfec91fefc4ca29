"""One recipe with several seeds: parallel processes, and one table of means and standard deviations."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from em_lightning.files import write_whole
from em_lightning.studies.results import combine, markdown_table, print_results


def run_seeds(
    command: Sequence[str], folder: Path, arguments: Sequence[str], seeds: Sequence[int], jobs: int | None = None
) -> None:
    """Run a recipe once per seed, each in its own process, and combine their ``results.json``.

    Args:
        command: the words that run the recipe, for instance ``["em-lightning", "run", "point_cloud_gmm"]``.
        folder: folder of the recipe's logger.
        arguments: arguments of the recipe.
        seeds: one per run.
        jobs: number of parallel processes; ``None`` takes the number of cores.

    Raises:
        ValueError: a run failed, or the runs have different tables.
    """
    from rich.progress import track

    stamp = time.strftime("%Y%m%d-%H%M%S")
    cores = os.cpu_count() or 1
    # A run with several ranks of its own uses the cores and the port of the process group alone.
    distributed = any("strategy" in argument or "devices" in argument for argument in arguments)
    jobs = 1 if distributed else min(jobs or cores, len(seeds))
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(cores // jobs, 1))}

    processes: list[subprocess.Popen[bytes]] = []

    def run_seed(seed: int) -> Path:
        version = f"{stamp}-seed{seed}"
        target = folder / version
        target.mkdir(parents=True)
        options = [f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.logger.version={version}"]
        with open(target / "output.txt", "w", encoding="utf-8") as output:
            environment = {**os.environ, **threads}
            words = [*command, *arguments, *options]
            process = subprocess.Popen(words, stdout=output, stderr=output, env=environment)
            processes.append(process)
            code = process.wait()
        if code:
            last = (target / "output.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise ValueError(f"seed {seed} ended with exit code {code}: {''.join(last)} ({output.name})")
        return target / "results.json"

    with ThreadPoolExecutor(jobs) as pool:
        try:
            paths = list(track(pool.map(run_seed, seeds), f"seeds, {jobs} at a time", total=len(seeds)))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise ValueError("interrupted") from None
    title, rows = f"{folder.name}, seeds {', '.join(map(str, seeds))}: mean ± standard deviation", combine(paths)
    target = folder / f"{stamp}-seeds"
    target.mkdir(parents=True)
    write_whole(target / "results.md", f"# {title}\n\n{markdown_table(rows)}\n")
    print_results(title, [], rows)
    print(f"Files in {target}: results.md")
