"""Terminal output of a recipe: lines that fit, the loss, numbers in one piece, no advertisements, its result last."""

import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from em_lightning import cli
from em_lightning.studies.results import fitted_table

ROOT = Path(cli.__file__).parents[2]
ROWS = [
    {"method": f"{name} operator, five steps", "held-out log-likelihood": -1.23456, "other": "2.716 ± 0.0093"}
    for name in ("trained", "classical")
]


def run_on_a_terminal(command, folder, columns=80):
    """Run a command on a pseudo-terminal; return the lines that it shows, with those that overwrite each other."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    received = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux's end of file of a terminal
            break
        if not chunk:
            break
        received += chunk
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received.decode())
    assert process.wait() == 0, text
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_a_run_on_a_terminal(tmp_path):
    small = ["--data.num_points=64", "--data.train_clouds=8", "--data.val_clouds=4", "--data.test_clouds=4"]
    small += ["--data.batch_size=4", "--model.num_components=3", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    command = [sys.executable, "-m", "em_lightning.cli", "run", "point_cloud_gmm", *small]
    lines = run_on_a_terminal([*command, "--trainer.log_every_n_steps=1", "--report.sklearn=false"], tmp_path)
    for word in ("FLOPs", "litlogger", "litmodels", "TPU"):
        assert not any(word in line for line in lines)
    assert any(line.startswith("Epoch 1:") and "2/2" in line and "train/loss=" in line for line in lines)
    assert all(len(line.partition("`")[0]) <= 80 for line in lines if line.startswith("Epoch"))
    assert any(re.match(r"Model: PointCloudGMM with [\d,]+ trainable parameters$", line) for line in lines)
    assert lines[-3].startswith("Files in lightning_logs/point_cloud_gmm/version_0: ")
    assert lines[-2] == "TensorBoard: tensorboard --logdir lightning_logs/point_cloud_gmm"
    assert lines[-1].startswith("The trained operator is ")


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_table_keeps_its_numbers_in_one_piece(width):
    console = Console(width=width, file=io.StringIO())
    console.print(fitted_table(ROWS), crop=False)
    lines = console.file.getvalue().rstrip().splitlines()
    assert sum("-1.235" in line for line in lines) == sum("2.716 ± 0.0093" in line for line in lines) == 2
    assert width < 60 or max(map(len, lines)) <= width
