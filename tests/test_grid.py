"""Tables of rows times seeds: trained, continued after an interruption, and compared with published numbers."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
import yaml

from em_lightning import cli
from em_lightning.cli.recipes import find_recipe, load_recipe
from em_lightning.studies import grid
from em_lightning.studies.results import compare, parse_number

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*args parameter is intended"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]
ROOT = Path(cli.__file__).parents[2]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def write_table(name="small.yaml", epochs=4, seeds=(1, 2), **rows):
    rows = rows or {
        "published": {"published": {"probe %": "90 ± 2", "parameters": 520}, "checked": {"l0": 4.0}},
        "mean": {"arguments": {"model.free_energy": 0.0}, "published": {"dead_units": 0}},
    }
    table = {
        "model": {"class_path": "em_lightning.studies.DecoderFreeEncoder", "init_args": {"num_components": 8}},
        "trainer": {
            "max_epochs": epochs,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "check_val_every_n_epoch": 1,
        },
        "report": {"last_epochs": 2, "probe": True, "figures": False},
        "table": {"title": "A small table", "seeds": list(seeds), "notes": ["A note."], "rows": rows},
    }
    Path(name).write_text(yaml.safe_dump(table))
    return name


def cells(here):
    return sorted((here / "lightning_logs" / "decoder_free_sae" / "cells").glob("*/results.json"))


@pytest.mark.slow
def test_a_table_is_run_and_continued(here, capfd):
    assert cli.main(["run", "decoder_free_sae", "--config", write_table(), "--jobs=2"]) == 0
    printed = capfd.readouterr().out
    table = (here / "lightning_logs" / "decoder_free_sae" / "small" / "results.md").read_text()
    assert table in printed and "| row | metric | published | checked | reproduced | difference | inside |" in table
    assert "| published | parameters | 520 |  | 520 ± 0 | +0 | yes |" in table and "A note." in table
    assert "`em-lightning run decoder_free_sae --config=small.yaml`, seeds 1, 2: mean" in table
    content = json.loads((here / "lightning_logs" / "decoder_free_sae" / "small" / "results.json").read_text())
    assert content["seeds"] == [1, 2] and len(content["cells"]) == len(cells(here)) == 4

    # Every cell is what a run of its own gives; those of one row differ by the seed.
    values = {
        name: json.loads((here / folder / "results.json").read_text()) for name, folder in content["cells"].items()
    }
    losses = [round(value["values"]["loss"], 3) for value in values.values()]
    assert len(set(losses)) == 4
    name = "published, seed 2"
    missing = here / content["cells"][name] / "results.json"
    missing.unlink()
    before = {path: path.stat().st_mtime_ns for path in cells(here)}
    assert cli.main(["run", "decoder_free_sae", "--config", "small.yaml"]) == 0
    after = {path: path.stat().st_mtime_ns for path in cells(here)}
    assert set(after) - set(before) == {missing} and all(after[path] == before[path] for path in before)
    assert json.loads(missing.read_text())["values"] == values[name]["values"]

    # Another table takes over the cells that it shares.
    shared = ["--config", write_table("shared.yaml", seeds=[2], published={"published": {"l0": 1}})]
    assert cli.main(["run", "decoder_free_sae", *shared]) == 0
    folders = json.loads((here / "lightning_logs/decoder_free_sae/shared/results.json").read_text())["cells"]
    assert folders == {name: content["cells"][name]} and len(cells(here)) == 4


class Stop(lightning.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise RuntimeError("stopped by the test")


def test_an_interrupted_row_resumes_from_its_checkpoint(here, monkeypatch):
    """Run the row in this process, so that a callback can interrupt it."""

    def run(seeds, stop=False):
        recipe, made = load_recipe(find_recipe("decoder_free_sae")), []
        monkeypatch.setattr(grid, "run_cells", lambda load, cells, jobs: made.extend(cells))
        monkeypatch.setattr(grid, "write_table", lambda *args: None)
        cli.run("decoder_free_sae", ["--config", write_table(epochs=4), "--seeds", ",".join(map(str, seeds))])
        row = [cell for cell in made if cell.row == "published"]
        if stop:
            row = [cell._replace(arguments=[*cell.arguments, f"--trainer.callbacks+={__name__}.Stop"]) for cell in row]
        for cell in row:
            grid.run_cell(lambda: recipe, cell)
        return [json.loads(cell.result.read_text()) for cell in row]

    with pytest.raises(RuntimeError, match="published, seed 1: .*stopped by the test"):
        run([1, 2], stop=True)
    resumed = run([1, 2])
    shutil.rmtree("lightning_logs")
    for found, expected in zip(resumed, run([1, 2]), strict=True):
        assert [each["epoch"] for each in found["history"]] == [1, 2, 3, 4]
        assert found["values"] == pytest.approx(expected["values"], rel=1e-6)
    assert torch.get_num_threads() == 1


def test_a_row_that_fails_is_named(here, capfd):
    write_table(broken={"arguments": {"model.num_components": 0}, "published": {"l0": 1}})
    assert cli.main(["run", "decoder_free_sae", "--config", "small.yaml"]) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert all(words in message for words in ("broken, seed 1", "num_components=0", "output.txt")), message


@pytest.mark.parametrize(
    ("values", "published", "checked", "expected"),
    [
        ([93.0, 93.4], "93.43 ± .38", "93.41 ± .26", ("93.2 ± 0.28", "-0.23", "yes")),
        ([92.0, 92.2], "93.43 ± .38", "93.41 ± .26", ("92.1 ± 0.14", "-1.3", "no")),
        ([92.96], 92.9, None, ("92.96", "+0.06", "no")),
        ([92.94], 92.9, None, ("92.94", "+0.04", "yes")),
        ([28.0, 28.2], 27.6, "27.9 ± 0.4", ("28.1 ± 0.14", "+0.5", "no")),
        ([27.0, 28.0], None, 27.9, ("27.5 ± 0.71", "-0.4", "no")),
    ],
)
def test_a_row_compares_with_published_values(values, published, checked, expected):
    line = compare(values, published, checked)
    assert (line["reproduced"], line["difference"], line["inside"]) == expected


def test_published_tables_name_metrics_that_exist():
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        table = (yaml.safe_load(path.read_text()) or {}).get("table")
        if table:
            for row in table["rows"].values():
                for value in [*row.get("published", {}).values(), *row.get("checked", {}).values()]:
                    assert len(parse_number(value)) == 3


def test_a_fit_shorter_than_the_validation_interval_reports(here):
    table = yaml.safe_load(Path(write_table(epochs=2, seeds=[1])).read_text())
    table["trainer"]["check_val_every_n_epoch"] = 10
    Path("small.yaml").write_text(yaml.safe_dump({key: part for key, part in table.items() if key != "table"}))
    assert cli.main(["run", "decoder_free_sae", "--config", "small.yaml"]) == 0
    (results,) = Path("lightning_logs").rglob("results.json")
    assert [each["epoch"] for each in json.loads(results.read_text())["history"]] == [2]


def test_a_table_contains_its_command(here, monkeypatch):
    commands = []
    monkeypatch.setattr(grid, "run_cells", lambda *args: None)
    monkeypatch.setattr(grid, "write_table", lambda folder, table, cells, command: commands.append(command))
    for args in (["--config", "ablation", "--data", "Digits"], ["--trainer.max_epochs=2", "--config=ablation"]):
        cli.run("decoder_free_sae", args)
    assert commands == [
        "em-lightning run decoder_free_sae --config=ablation --data Digits",
        "em-lightning run decoder_free_sae --config=ablation --trainer.max_epochs=2",
    ]


@pytest.mark.parametrize("option", ["--print_config", "--help", "-h"])
@pytest.mark.parametrize("many", ["--config=small.yaml", "--seeds=1,2"])
def test_printing_the_config_or_help_starts_no_runs(option, many, here, capsys):
    write_table()
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", "decoder_free_sae", many, "--model.lr=0.25", option])
    printed = capsys.readouterr().out
    assert ("lr: 0.25" if "config" in option else "--config NAME or FILE") in printed
    if "config" in option and "small" in many:
        assert yaml.safe_load(printed)["table"]["title"] == "A small table"
    assert not Path("lightning_logs").exists()


def test_an_unknown_entry_of_a_table_is_named(here, capsys):
    Path("small.yaml").write_text("table: {title: A, seeds: [1], row: {}}\n")
    assert cli.main(["run", "decoder_free_sae", "--config", "small.yaml"]) == 2
    assert "row" in capsys.readouterr().err


def test_an_interrupt_ends_the_processes(here, monkeypatch):
    def interrupted(rows, description):
        raise KeyboardInterrupt

    monkeypatch.setattr("rich.progress.track", interrupted)
    with pytest.raises(ValueError, match="interrupted"):
        cli.run("decoder_free_sae", ["--config", write_table(epochs=10_000), "--jobs=2"])
    assert not multiprocessing.active_children()


class Started(Exception):
    """Raised instead of starting processes."""


class OnGPUs:
    """Stands for a recipe that trains on the first GPU, or on the CPU if the arguments say so."""

    def prepare(self, arguments):
        device = "cpu" if "--trainer.accelerator=cpu" in arguments else "cuda:0"
        return SimpleNamespace(trainer=SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device))))


@pytest.mark.parametrize(
    "gpus, arguments, jobs, expected",
    [
        (1, [], None, 1),
        (2, [], None, 2),
        (8, [], None, 4),  # there are four runs
        (0, [], None, 4),
        (1, ["--trainer.accelerator=cpu"], None, 4),
        (1, [], 3, 3),  # as the user asks
    ],
)
def test_by_default_each_gpu_has_one_run_at_a_time(gpus, arguments, jobs, expected, tmp_path, monkeypatch):
    def pool(workers, *_):
        started.append(workers)
        raise Started

    started = []
    monkeypatch.setattr(grid, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(grid.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    runs = [grid.Cell.seeded("row", seed, arguments, tmp_path, str(seed)) for seed in range(4)]
    with pytest.raises(Started):
        grid.run_cells(OnGPUs, runs, jobs)
    assert started == [expected]


def write_visible_gpu(load, cell):
    cell.result.parent.mkdir(parents=True, exist_ok=True)
    time.sleep(1.0)  # so that every process gets a run
    cell.result.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))


@pytest.mark.parametrize("visible, expected", [(None, {"0", "1"}), ("2,5", {"2", "5"})])
def test_each_process_sees_one_gpu(visible, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(grid, "run_cell", write_visible_gpu)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    runs = [grid.Cell.seeded("row", seed, [], tmp_path, str(seed)) for seed in range(2)]
    grid.run_cells(OnGPUs, runs)
    assert {run.result.read_text() for run in runs} == expected
