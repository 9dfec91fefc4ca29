"""Killed and resumed runs equal uninterrupted ones, and processes end with the process that started them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

import em_lightning
from em_lightning import cli
from em_lightning.cli.recipes import recipes

ROOT = Path(em_lightning.__file__).parents[1]
RECIPES = sorted(recipes())
LINE = r"([\w]+): (\d+) kills .* results are bitwise equal, (\w+)"


def kills(*arguments, seed=0):
    """Return the number of kills and the hash of weights and results, for each case of benchmarks/kills.py."""
    script = ROOT / "benchmarks" / "kills.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(seed)}
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: (int(count), digest) for name, count, digest in re.findall(LINE, done.stdout)}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_checkpoints_are_written_during_the_run(path):
    """Without a top-k Lightning saves the last one where a number of steps asks for it, and at the end of the fit."""
    options = yaml.safe_load(path.read_text()).get("checkpoint") or {}
    assert options.get("save_top_k", 1) != 0 or "every_n_train_steps" in options


@pytest.mark.slow
def test_killed_run_equals_uninterrupted_run():
    (found,) = kills("gaussian_mixture", "--kills=2").values()
    assert found[0] == 2


@pytest.mark.nightly
def test_every_recipe_is_killed_twenty_times():
    found = kills("--kills=20")
    assert all(any(name.startswith(recipe) for name in found) for recipe in RECIPES)
    assert all(count == 20 for count, _ in found.values())


@pytest.mark.nightly
def test_the_same_seed_gives_the_same_weights_in_every_process():
    first, second = kills("--kills=0", seed=1), kills("--kills=0", seed=2)
    assert first == second and all(any(name.startswith(recipe) for name in first) for recipe in RECIPES)


def group_of(leader):
    """Return the processes of a session that still run, and whether each is another rank than the first."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == leader and state != "Z":
                    found[int(folder.name)] = b"LOCAL_RANK=1" in (folder / "environ").read_bytes()
            except OSError:
                continue
    return found


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc, as Linux has")


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, number",
    [("table", signal.SIGTERM), ("table", signal.SIGKILL), ("seeds", signal.SIGTERM), ("seeds", signal.SIGINT)],
)
def test_the_workers_of_a_table_and_of_seeds_end_with_their_run(kind, number, tmp_path):
    rows = {"first": {"published": {"l0": 1}}, "second": {"arguments": {"model.lr": 0.1}, "published": {"l0": 1}}}
    table = {"table": {"title": "Endless", "seeds": [1], "rows": rows}}
    (tmp_path / "endless.yaml").write_text(yaml.safe_dump(table))
    command = [sys.executable, "-m", "em_lightning.cli", "run", "decoder_free_sae", "--trainer.max_epochs=1000000"]
    command += ["--config=endless.yaml", "--jobs=2"] if kind == "table" else ["--seeds=1,2", "--jobs=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"start_new_session": True, "stderr": subprocess.PIPE}
    # A shell ignores SIGINT in its background jobs, and children inherit that.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **options)
    try:
        wait_until(lambda: len(list(tmp_path.rglob("events.out*"))) == 2 and len(group_of(process.pid)) >= 3, 300)
        os.kill(process.pid, number)
        wait_until(lambda: process.poll() is not None and not group_of(process.pid), 60)
        assert process.returncode == (2 if number == signal.SIGINT else -number)
        if number == signal.SIGINT:
            assert "em-lightning: interrupted" in process.stderr.read().decode()
    finally:
        for left in group_of(process.pid):
            os.kill(left, signal.SIGKILL)
        process.stderr.close()


def test_rank_leaves_its_process_group(tmp_path, monkeypatch):
    def run(recipe, arguments):
        if arguments:
            dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)

    monkeypatch.setattr(cli, "run", run)
    for strategy in ([], ["--trainer.strategy=ddp"]):
        assert cli.main(["run", "gaussian_mixture", *strategy]) == 0
        assert not dist.is_initialized()


@on_linux
@pytest.mark.nightly
@pytest.mark.parametrize("moment", ["at the start", "in training"])
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_of_two_ranks_is_killed_the_other_ends(rank, moment, tmp_path):
    command = [sys.executable, "-m", "em_lightning.cli", "run", "gaussian_mixture", "--trainer.strategy=ddp"]
    command += ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.max_epochs=1000000", "--model.tol=0"]
    command += ["--trainer.logger.version=v", "--trainer.enable_progress_bar=false", "--data.block_rows=5000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "output.txt", "w") as output:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        begun = any if moment == "at the start" else lambda _: list(tmp_path.rglob("last.ckpt"))
        wait_until(lambda: any(group_of(process.pid).values()) and begun(group_of(process.pid).values()), 300)
        (other,) = (number for number, is_other in group_of(process.pid).items() if is_other)
        os.kill(other if rank else process.pid, signal.SIGKILL)
        # A rank that finds no rank 0 waits for the timeout of two minutes.
        wait_until(lambda: process.poll() is not None and not group_of(process.pid), 200)
        assert process.returncode not in (0, None)
    finally:
        for number in group_of(process.pid):
            os.kill(number, signal.SIGKILL)
    assert not list(tmp_path.rglob("results.*")) and not list(tmp_path.rglob("*.partial"))
    if moment == "in training":
        (last,) = tmp_path.rglob("last.ckpt")
        assert torch.load(last, weights_only=True)["global_step"] > 0
