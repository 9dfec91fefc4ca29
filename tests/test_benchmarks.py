"""The benchmark of a GPU, run on the CPU at toy size, and the loop that recipes are timed against."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.recipes import Loop
from em_lightning.data import Tensors

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_measurements_for_a_gpu_run_on_a_cpu(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--scale", "0.0005", "--repeats", "1"]
    command += ["--table", "gpu.md"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not [row for rows in found.values() for row in rows.values() if "failed" in row]
    failed = {name: row for name, row in found["Largest relative errors"].items() if isinstance(row["float32"], str)}
    assert not failed
    assert (tmp_path / "gpu.md").read_text().count("##") == 5


def test_the_loop_of_the_classifier_scores_the_logits_that_it_trains():
    torch.manual_seed(0)
    images, labels = torch.randn(200, 1, 28, 28), torch.randint(10, (200,))
    loop = Loop("volume_control", SimpleNamespace(whole=lambda split: Tensors(images, labels)), True, None)
    energies = loop.encoder(images.flatten(1)).relu()
    right = loop.head(energies + torch.logsumexp(-energies, 1, keepdim=True)).argmax(1) == labels
    assert loop.measure()[-1] == right.float().mean()
    assert not torch.equal(right, loop.head(energies).argmax(1) == labels)
