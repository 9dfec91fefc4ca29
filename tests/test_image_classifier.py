"""The image classifier of the studies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from scipy.stats import entropy

from em_lightning.callbacks import SwapActivations
from em_lightning.data import Digits
from recipes.swap_activations import ImageClassifier

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
]


def trainer(folder, **options):
    return lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("network", "dim"), [("mlp", -1), ("cnn", 1)])
def test_the_classifier_measures_the_activations_that_were_swapped_in(tmp_path, network, dim):
    data = Digits(batch_size=256)
    torch.manual_seed(0)
    module = ImageClassifier(data.shape, data.num_classes, network, width=6)
    run = trainer(tmp_path, callbacks=[SwapActivations("softmax_gated")])
    run.fit(module, data)
    measured = run.test(module, data, verbose=False)[0]
    assert module.network.activation2.dim == dim

    x, y = data.whole("test")
    first = module.network[:3] if network == "mlp" else module.network[:2]
    second = module.network[:5] if network == "mlp" else module.network[:4]
    with torch.no_grad():
        hidden = [part(x).double().movedim(1, -1).flatten(0, -2).numpy() for part in (first, second)]
        confidence, guess = module(x).softmax(-1).max(-1)
    for number, a in enumerate(hidden, 1):
        found = {name.rpartition("/")[2]: value for name, value in measured.items() if f"activation{number}" in name}
        variance = a.var(0, ddof=1)
        assert found["dead_units"] == (variance < 1e-3 * variance.mean()).sum()
        assert found["redundancy"] == pytest.approx((np.corrcoef(a.T) ** 2).sum() - a.shape[1], rel=1e-3)
        spectrum = np.linalg.eigvalsh(np.cov(a.T)).clip(0)
        assert found["effective_rank"] == pytest.approx(np.exp(entropy(spectrum)), rel=1e-4)
    hit = (guess == y).double().numpy()
    assert measured["test/accuracy"] == pytest.approx(hit.mean())
    bins = np.ceil(confidence.double().numpy() * 15)
    error = sum(abs((hit - confidence.numpy())[bins == b].sum()) for b in np.unique(bins)) / len(hit)
    assert measured["test/calibration_error"] == pytest.approx(error, rel=1e-4)


def test_wrong_arguments_of_the_classifier_raise():
    with pytest.raises(ValueError, match=r"network='rnn'.*mlp.*cnn"):
        ImageClassifier(network="rnn")
    with pytest.raises(ValueError, match=r"num_classes=1\b"):
        ImageClassifier(num_classes=1)
    with pytest.raises(ValueError, match=r"width=0\b"):
        ImageClassifier(width=0)


def test_the_recipe_compares_the_swapped_network_with_its_relus(tmp_path):
    command = [sys.executable, "-m", "em_lightning.cli", "run", "swap_activations", "--trainer.max_epochs=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "lightning_logs" / "swap_activations" / "version_0"
    result = json.loads((folder / "results.json").read_text())
    swapped, relu = result["values"], result["baseline"]
    assert swapped.keys() == relu.keys() and swapped["loss"] != relu["loss"]
    # The last lines are the files, the command for TensorBoard and the verdict.
    files, tensorboard, verdict = done.stdout.splitlines()[-3:]
    gain = f"{swapped['accuracy %'] - relu['accuracy %']:+.2f}"
    assert f"with ReLU {relu['accuracy %']:.2f} %: {gain} points" in verdict
    assert "results.md" in files and tensorboard.startswith("TensorBoard: tensorboard --logdir ")
