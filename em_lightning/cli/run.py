"""``em-lightning run``: one run of a recipe, one run per seed, or a table of rows and seeds."""

from __future__ import annotations

import argparse
import functools
import shlex
from collections.abc import Sequence
from pathlib import Path

from em_lightning.cli.recipes import config_of, find_config, find_recipe, load_recipe, read_config


def run(name: str, args: Sequence[str]) -> None:
    """Run a recipe, given by its name or the path of a copy of its script, with the arguments of its LightningCLI.

    ``--config`` takes the name of a variant or a file. ``--seeds 0,1,2`` runs the recipe once per seed in ``--jobs``
    parallel processes and combines the tables. A config with the entry ``table`` runs or continues that table.
    """

    def integers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    script = find_recipe(name)
    parser = argparse.ArgumentParser(prog=f"em-lightning run {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    parser.add_argument("--seeds", type=integers, default=[], metavar="0,1,2")
    parser.add_argument("--jobs", type=int)
    options, rest = parser.parse_known_args(args)
    paths = [find_config(script, config) for config in options.config]
    contents = [read_config(path) for path in paths]
    # Configs first, so that the other arguments override them.
    arguments = [*(f"--config={path}" for path in paths), *rest]
    folder = Path("lightning_logs") / script.stem
    logger = next((word for word in rest if word.startswith("--trainer.logger")), None)
    tables = [(path, content["table"]) for path, content in zip(paths, contents, strict=True) if content.get("table")]
    prints = any(word.partition("=")[0] in ("-h", "--help", "--print_config") for word in rest)  # and exits
    if prints or not (tables or options.seeds or options.jobs):
        load_recipe(script).fit(arguments)
    elif logger and (tables or options.seeds):
        raise ValueError(f"{logger} must not be given with --seeds or the config of a table, which set the loggers")
    elif tables:
        from em_lightning.studies.grid import run_table

        path, table = tables[-1]  # as the last of several configs overrides the others
        entry = {**table, "seeds": options.seeds or table.get("seeds")}
        command = shlex.join(["em-lightning", "run", name, *(f"--config={each}" for each in options.config), *rest])
        # Without the entry "table": a run is found by the hash of its config, which other rows must not change.
        configs = [read_config(config_of(script)), *({**content, "table": None} for content in contents)]
        load, results = functools.partial(load_recipe, script), folder / path.stem
        run_table(load, entry, results, arguments, configs=configs, command=command, jobs=options.jobs)
    elif options.seeds:
        from em_lightning.studies.grid import run_seeds

        run_seeds(functools.partial(load_recipe, script), folder, arguments, options.seeds, options.jobs)
    else:
        raise ValueError(f"--jobs={options.jobs} must be given together with --seeds or the config of a table")
