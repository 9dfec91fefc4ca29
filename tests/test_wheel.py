"""Build the wheel, install it outside the checkout, and run its commands."""

import os
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from em_lightning.cli import recipes

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run(command, check=True, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel):
    folder = wheel.parent / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)], check=True)
    return folder


@pytest.fixture
def run(site, tmp_path):
    def run(*command):
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_wheel_contains_types_recipes_and_configs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"em_lightning"}
    assert "em_lightning/py.typed" in names
    for name in recipes():
        assert f"em_lightning/recipes/{name}.py" in names and f"em_lightning/configs/{name}.yaml" in names
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs == {name.removeprefix("em_lightning/") for name in names if name.endswith(".yaml")}


def test_the_installed_command_lists_copies_and_runs_recipes(run, site, tmp_path):
    command = site / "bin" / "em-lightning"
    assert "point_cloud_gmm" in run(command, "ls")
    copied = run(command, "cp", "point_cloud_gmm", "mine").split()
    assert copied[0] == "mine/point_cloud_gmm.py" and all((tmp_path / name).is_file() for name in copied)
    fast = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    run(command, "run", "point_cloud_gmm", *fast)
    run(command, "run", "mine/point_cloud_gmm.py", "--model.num_components=4", *fast)


def test_import_loads_only_torch_in_under_0_3_s(run, site):
    code = """
import time, torch
start = time.perf_counter()
import em_lightning
em_lightning.KERNELS
seconds = time.perf_counter() - start
import sys
print(em_lightning.__file__, seconds, *{"lightning", "pytorch_lightning", "torch_geometric"} & {*sys.modules})
"""
    file, *_ = printed = run("-c", code).split()
    assert Path(file).is_relative_to(site) and len(printed) == 2, printed
    assert statistics.median(float(run("-c", code).split()[1]) for _ in range(3)) < 0.3
