"""A run of a recipe in unusual environments: options of Python, locales, read-only and full folders, unusual paths."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
RUN = ["-m", "em_lightning.cli", "run", "gaussian_mixture", "--model.num_components=2", "--model.num_features=2"]
RUN += ["--report.components=[]", "--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--ckpt_path=last"]
RUN += ["--trainer.logger.version=run"]
BLOBS = ["--data.num_points=300", "--data.num_features=2", "--data.true_components=2", "--data.held_out_points=50"]
pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def run(folder, *arguments, python=(), prefix=(), **environment):
    """Run the recipe in a folder and return its result."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [*prefix, sys.executable, *python, *RUN, *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


def assert_done(done, folder):
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    results = folder / "lightning_logs" / "gaussian_mixture" / "run"
    assert {"results.md", "results.json", "components.png"} <= {path.name for path in results.iterdir()}
    assert (results / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(
    "python, environment",
    [
        (["-O"], {}),
        # Warnings of Lightning and PyTorch about each other are ignored, as in the tests.
        (["-W", "error", "-W", "ignore::FutureWarning", "-W", "ignore::DeprecationWarning"], {}),
        ([], {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ],
    ids=["without assertions", "warnings are errors", "ASCII"],
)
def test_options_of_python_and_locales(python, environment, tmp_path):
    assert_done(run(tmp_path, *BLOBS, python=python, **environment), tmp_path)


@pytest.mark.parametrize("name", ["with blanks in it", "données ÄÖ", "данные", "数据", "it's 50% [x] #1"])
def test_paths_with_blanks_and_other_alphabets(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    for number, rows in enumerate((100, 50)):
        np.save(folder / f"{number} {name[:2]}.npy", np.random.default_rng(number).random((rows, 2)))
    assert_done(run(folder, "--data=TabularDataModule", f"--data.data={folder}"), folder)


needs_mounts = pytest.mark.skipif(
    sys.platform != "linux"
    or not shutil.which("unshare")
    or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="mounts folders, which this system does not allow",
)


def mounting(*commands):
    """Return the beginning of a command that runs after commands in a mount namespace of its own."""
    return ["unshare", "--mount", "sh", "-c", " && ".join([*commands, 'exec "$@"']), "sh"]


@needs_mounts
def test_home_and_data_may_be_read_only(tmp_path):
    home, data, work = (tmp_path / name for name in ("home", "data", "work"))
    for folder in (home, data, work):
        folder.mkdir()
    np.save(data / "0.npy", np.random.default_rng(0).random((100, 2)))
    mounts = [f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}" for folder in (home, data)]
    arguments = ["--data=TabularDataModule", f"--data.data={data}"]
    assert_done(run(work, *arguments, prefix=mounting(*mounts), HOME=str(home)), work)


@needs_mounts
def test_the_temporary_folder_may_be_full(tmp_path):
    full, work = tmp_path / "full", tmp_path / "work"
    full.mkdir()
    work.mkdir()
    fill = [f"mount -t tmpfs -o size=64k tmpfs {full}", f"(head -c 1M /dev/zero > {full}/x || true) 2>/dev/null"]
    assert_done(run(work, *BLOBS, prefix=mounting(*fill), TMPDIR=str(full)), work)


@needs_mounts
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_folder_that_cannot_be_written_ends_the_run_with_one_line(kind, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    mounts = [f"mount -t tmpfs -o size=4k tmpfs {folder}", f"cd {folder}"]
    if kind == "read-only":
        mounts = [f"mount --bind {folder} {folder}", f"mount -o remount,ro,bind {folder}", f"cd {folder}"]
    done = run(tmp_path, *BLOBS, prefix=mounting(*mounts))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("em-lightning: ")]
    assert ("No space left" if kind == "full" else "Read-only") in line and "save_dir" in line


def test_the_first_start_gives_no_advice_and_the_second_resumes(tmp_path):
    first = run(tmp_path, *BLOBS)
    assert "save_last" not in first.stderr and "Restor" not in first.stderr
    second = run(tmp_path, *BLOBS, "--trainer.max_epochs=3")
    assert second.returncode == 0 and "Restoring states from the checkpoint path" in second.stderr
