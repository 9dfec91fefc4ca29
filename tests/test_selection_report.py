"""The report at the end of a fit of one mixture, beside scikit-learn and closed forms."""

import json
import math
import time
import warnings

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from em_lightning.data import TabularDataModule
from em_lightning.mixture import COVARIANCES
from em_lightning.modules import GaussianMixtureModule
from em_lightning.studies import GaussianBlobs, SelectionReport

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


def fit(folder, module, data, report, checkpoint=None, others=(), **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 3, "enable_checkpointing": False, **options}
    options |= {"callbacks": [report, *others], **quiet}
    trainer = lightning.Trainer(default_root_dir=folder, accelerator="cpu", **options)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return trainer


def table(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def log_prob(mixture, x):
    """Log-densities by scipy, of a mixture of any structure."""
    parts = []
    for k, mean in enumerate(mixture.means[0].numpy()):
        covariance = mixture.covariances[0, min(k, mixture.covariances.shape[1] - 1)].numpy()
        matrix = covariance if covariance.ndim == 2 else covariance * np.eye(len(mean))
        parts.append(float(mixture.log_weights[0, k]) + multivariate_normal(mean, matrix).logpdf(x))
    return logsumexp(parts, axis=0)


@pytest.mark.parametrize("kind", sorted(COVARIANCES))
def test_every_row_is_scipys_and_scikit_learns(kind, tmp_path, capsys):
    data = GaussianBlobs(800, 2, true_components=3, held_out_points=200, block_rows=300)
    module = GaussianMixtureModule(3, 2, covariance=kind, tol=0.0, init="farthest" if kind == "tied" else "kmeans++")
    fit(tmp_path, module, data, SelectionReport(components=[2, 1], max_iters=7))
    own, truth, other, two, one = table(tmp_path)
    x, held_out = (data.tables[name].rows(0, size).numpy() for name, size in (("train", 800), ("held_out", 200)))

    sklearn = GaussianMixture(3, covariance_type=kind, tol=0.0, max_iter=7, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        sklearn.fit(x)
    assert other["mixture"] == "scikit-learn" and other["iterations"] == 7
    assert other["log-likelihood"] == pytest.approx(sklearn.score(x), abs=1e-4)
    assert other["held out"] == pytest.approx(sklearn.score(held_out), abs=1e-4)
    assert (other["BIC"], other["AIC"]) == pytest.approx((sklearn.bic(x), sklearn.aic(x)), abs=1)

    for row, mixture, parameters in ((own, module.mixture, sklearn._n_parameters()), (truth, data.truth(), 17)):
        level = log_prob(mixture, x)
        assert row["log-likelihood"] == pytest.approx(level.mean(), abs=1e-4) and row["parameters"] == parameters
        assert row["held out"] == pytest.approx(log_prob(mixture, held_out).mean(), abs=1e-4)
        assert row["BIC"] == pytest.approx(parameters * math.log(800) - 2 * level.sum(), abs=1)
        assert row["AIC"] == pytest.approx(2 * parameters - 2 * level.sum(), abs=1)
    assert own["mixture"] == "this run (em, 1 process)" and own["iterations"] == 3
    assert truth["mixture"] == "the mixture the rows were drawn from"

    assert (two["K"], one["K"], two["iterations"]) == (2, 1, 7)  # one Gaussian has a closed form
    covariance = np.cov(x.T, bias=True)
    covariance = {"diag": np.diag(np.diag(covariance)), "spherical": np.trace(covariance) / 2 * np.eye(2)}.get(
        kind, covariance
    )
    closed = multivariate_normal(x.mean(0), covariance).logpdf(x).mean()
    assert one["log-likelihood"] == pytest.approx(closed, abs=1e-3)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["components.png", "selection.png", "training.png"]
    assert "800 x 2 from a mixture of 3 Gaussians" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_rows_of_one_feature_that_count_more_than_once(kind, tmp_path):
    x = torch.cat([torch.randn(60, 1) - 3, torch.randn(40, 1) + 3]).double()
    counts = torch.randint(1, 4, (100,))
    found = []
    for name, data in (
        ("counted", TabularDataModule(x, counts.double())),
        ("repeated", TabularDataModule(x.repeat_interleave(counts, 0))),
    ):
        module = GaussianMixtureModule(2, 1, covariance=kind, tol=0.0, init="farthest")
        fit(tmp_path / name, module, data, SelectionReport(components=[1], sklearn_rows=50))
        found.append(table(tmp_path / name))
        assert (tmp_path / name / "components.png").exists()
    for counted, repeated in zip(*found, strict=True):
        assert {**counted, "seconds": 0} == pytest.approx({**repeated, "seconds": 0}, abs=1e-4)
    assert [row["mixture"] for row in found[0]] == ["this run (em, 1 process)", "EM"]


def test_a_resumed_run_reports_all_its_epochs(tmp_path):
    data = GaussianBlobs(300, 2, true_components=2, held_out_points=20)
    straight = SelectionReport(sklearn_rows=0)
    fit(tmp_path, GaussianMixtureModule(2, 2, tol=0.0), data, straight, max_epochs=4)
    first, second = SelectionReport(sklearn_rows=0), SelectionReport(sklearn_rows=0)
    trainer = fit(tmp_path, GaussianMixtureModule(2, 2, tol=0.0), data, first, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, GaussianMixtureModule(2, 2, tol=0.0), data, second, tmp_path / "half.ckpt", max_epochs=4)
    levels = [[one["log_likelihood"] for one in report.history] for report in (second, straight)]
    assert levels[0] == levels[1] and len(levels[0]) == 4
    assert second.history[:2] == first.history and all(one["seconds"] > 0 for one in second.history)
    assert not (tmp_path / "selection.png").exists()  # nothing to select from


class Slow(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(0.1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(tmp_path):
    """Two epochs of three blocks; resumed within the first, at its end and within the second."""
    data = GaussianBlobs(300, 2, true_components=2, held_out_points=20, block_rows=100)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    for step in (None, 2, 3, 5):
        checkpoint = step and tmp_path / f"step={step}.ckpt"
        report = SelectionReport(sklearn_rows=0)
        options = {"max_epochs": 2, "enable_checkpointing": True, "others": [Slow(), keep]}
        fit(tmp_path, GaussianMixtureModule(2, 2, tol=0.0), data, report, checkpoint, **options)
        assert 0.6 < table(tmp_path)[0]["seconds"] < 3.0, step
    assert "not training that an interruption lost" in (tmp_path / "results.md").read_text()


def test_what_it_does_not_do(tmp_path):
    with pytest.raises(ValueError, match=r"components=\[3, 0\]"):
        SelectionReport(components=(3, 0))
    data = GaussianBlobs(100, 2, true_components=2, held_out_points=10)
    fit(tmp_path, GaussianMixtureModule(2, 2), data, SelectionReport(), fast_dev_run=1)
    assert not list(tmp_path.iterdir())
