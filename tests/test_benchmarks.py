"""Benchmarks at toy size: GPU, backends and precision of EM, and the loop that recipes are timed against."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import backends, em_operator
from benchmarks.recipes import Loop
from em_lightning import EMOperator
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
    assert (tmp_path / "gpu.md").read_text().count("##") == 6


def test_the_loop_of_the_classifier_scores_the_logits_that_it_trains():
    torch.manual_seed(0)
    images, labels = torch.randn(200, 1, 28, 28), torch.randint(10, (200,))
    loop = Loop("volume_control", SimpleNamespace(whole=lambda split: Tensors(images, labels)), True, None)
    energies = loop.encoder(images.flatten(1)).relu()
    right = loop.head(energies + torch.logsumexp(-energies, 1, keepdim=True)).argmax(1) == labels
    assert loop.measure()[-1] == right.float().mean()
    assert not torch.equal(right, loop.head(energies).argmax(1) == labels)


def test_the_log_likelihood_in_the_loop_is_that_of_the_fitted_mixture_in_the_units_of_the_points():
    torch.manual_seed(0)
    x = 40.0 * em_operator.blobs(2, 100, 3, 4).double() + 7.0  # so that the loop scales and centers them
    operator = EMOperator(4, 3, residual=False, covariance_floor=em_operator.LOW_FLOOR)
    start = operator(x, num_iters=0)
    expected = operator(x, init=start, num_iters=5).log_prob(x).mean(1)
    torch.testing.assert_close(em_operator.in_the_loop(x, start, iterations=5), expected, rtol=1e-9, atol=0.0)


def test_both_backends_find_the_log_likelihood_of_the_reference_in_float64(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["backends.py", "--sets", "1"])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # of the whole test process
    backends.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    errors = {(row[0], row[1]): float(row[-1]) for row in rows}
    assert len(errors) == 4
    assert max(error for (_, dtype), error in errors.items() if dtype == "float64") < 1e-9
    assert max(errors.values()) < 1e-5
